"""Memory while a prompt is composed: the resident set of a fresh process, with a cache large enough to stand out.

The same is measured here while documents are ingested, for tests/reliability.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from process_memory import forget_peak, resident

from blockrag.model.running import _SLACK_TOKENS

BLOCKS = 40
BLOCK_TOKENS = 50
QUERY, ROOM = 4, 8
TOKEN_BYTES = 64 << 10
# In float32: 125 MiB for the prompt below, on a model whose weights are 17 MiB.
SHAPE = {
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
    "max_position_embeddings": 8192,
}
CACHE_BYTES = 8 * 2 * 16 * 64 * 4 * (BLOCKS * BLOCK_TOKENS + QUERY + ROOM + _SLACK_TOKENS)
KINDS = ("disk", "memory")
PRECISIONS = ("float16", "float32")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/clear_refs")


def measure(directory: str, *, blocks: int = BLOCKS) -> dict[str, dict[str, int]]:
    """Compose a warm prompt from each store at each precision: bytes of the cache, and of the peak above the start."""
    sys.path.insert(0, str(Path(__file__).parent))
    from test_exactness import prompt_of
    from tiny_models import ModelCase, tiny_model
    from tiny_tokenizers import plain_tokenizer

    from blockrag.model.block_model import BlockModel
    from blockrag.model.facts import BlockAttentionFacts
    from blockrag.stores import MemoryStore
    from blockrag.stores.disk import DiskStore

    torch.set_num_threads(1)
    weights = tiny_model(ModelCase("wide", "llama", SHAPE))
    prompt = prompt_of([BLOCK_TOKENS * BLOCKS // blocks] * blocks, QUERY)
    results = {}
    for precision in PRECISIONS:
        for kind in KINDS:
            store: Any = DiskStore(Path(directory) / precision) if kind == "disk" else MemoryStore()
            model = BlockModel(
                weights,
                plain_tokenizer(),
                store=store,
                precision=precision,  # type: ignore[arg-type]
                facts=BlockAttentionFacts(block_fine_tuned=True),
            )
            model.materialize(prompt.local_blocks)
            results[f"{kind}-{precision}"] = compose(model, prompt)
            store.close()
    return results


def measure_ingest(directory: str) -> dict[str, int]:
    """Ingest documents with far more KV states than may be held: bytes of a batch, of all, and of the peak."""
    sys.path.insert(0, str(Path(__file__).parent))
    from tiny_models import ModelCase, tiny_model
    from tiny_tokenizers import plain_tokenizer

    from blockrag.encoders import LexicalEncoder
    from blockrag.index import PassageIndex
    from blockrag.ingest import Document, ingest
    from blockrag.model.block_model import _BATCH_TOKENS, BlockModel
    from blockrag.model.facts import BlockAttentionFacts
    from blockrag.stores.disk import DiskStore

    torch.set_num_threads(1)
    facts = BlockAttentionFacts(block_fine_tuned=True)
    store = DiskStore(Path(directory) / "kv")
    model = BlockModel(
        tiny_model(ModelCase("wide", "llama", SHAPE)), plain_tokenizer(), store=store, precision="float32", facts=facts
    )
    with PassageIndex(LexicalEncoder(64), Path(directory) / "index") as index:

        def run(numbers: range) -> int:
            texts = [" ".join(f"The river {number * 97 + place} runs." for place in range(25)) for number in numbers]
            sources = [Document(f"d{number}", text) for number, text in zip(numbers, texts, strict=True)]
            return ingest(sources, index=index, model=model, store=store).tokens_new

        # Imports, and what the first forward allocates for good.
        run(range(1))
        gc.collect()
        forget_peak()
        before = resident("VmRSS")
        tokens = run(range(1, 33))
        peak = resident("VmHWM") - before
    store.close()
    return {"batch": _BATCH_TOKENS["cpu"] * TOKEN_BYTES, "all": tokens * TOKEN_BYTES, "peak": peak}


def compose(model: Any, prompt: Any) -> dict[str, int]:
    from blockrag.rope import angle_table

    # Kept between prompts, and shared by all of them: not this prompt's memory.
    angle_table(model.profile.regimes[0].ropes[0].keys, prompt.num_tokens, torch.device("cpu"))
    running = model.start()
    # What an earlier model kept must not be freed while this one is measured.
    gc.collect()
    forget_peak()
    before = resident("VmRSS")
    running.extend(prompt.blocks, room=ROOM)
    peak = resident("VmHWM") - before
    assert running.usage.blocks_reused == len(prompt.local_blocks)
    cache = running.cache.nbytes
    running.close()
    return {"cache": cache, "peak": peak}


def in_a_fresh_process(what: str, directory: Path) -> dict[str, Any]:
    # glibc then returns every larger piece at once, so that the resident set is what is in use.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, str(Path(__file__)), what, str(directory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    return in_a_fresh_process("compose", tmp_path_factory.mktemp("kv"))


@LINUX
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_composing_needs_little_more_than_the_cache(
    measured: dict[str, dict[str, int]], kind: str, precision: str
) -> None:
    """Blocks are placed one by one and dropped: never a second copy of the prompt, from no store."""
    cache, peak = (measured[f"{kind}-{precision}"][name] for name in ("cache", "peak"))
    assert cache == CACHE_BYTES
    assert peak >= 0.95 * cache, "the measurement sees the cache itself"
    assert peak <= 1.1 * cache, f"{peak / cache:.2f}"


if __name__ == "__main__":
    what, directory, *blocks = sys.argv[1:]
    result: dict[str, Any] = (
        measure_ingest(directory) if what == "ingest" else measure(directory, blocks=int((*blocks, BLOCKS)[0]))
    )
    sys.stdout.write(json.dumps(result) + "\n")
