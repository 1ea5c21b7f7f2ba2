"""Views of one model for several tenants: they share the model and none of the blocks, wherever blocks may be."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from live_server import DOCUMENTS, QUESTION, live_server
from test_exactness import QUERY, oracle_greedy, prompt_of
from tiny_models import REFUSED_CASES, tiny_model
from tiny_tokenizers import plain_tokenizer
from typer.testing import CliRunner

from blockrag.cli import app
from blockrag.encoders.lexical import LexicalEncoder
from blockrag.errors import InputError
from blockrag.index import PassageIndex
from blockrag.model.block_model import BlockModel
from blockrag.model.config import ModelConfig
from blockrag.model.device_pool import DevicePool
from blockrag.model.sampling import GenerationOptions
from blockrag.passage import Passage
from blockrag.rag import BlockRAG
from blockrag.stores import MemoryStore

Make = Callable[..., BlockModel]

LENGTHS = (7, 12, 9, 1)
PROMPT = prompt_of(LENGTHS, QUERY)
OPTIONS = GenerationOptions(max_new_tokens=4, ignore_eos=True)
COLD, WARM = (0, len(LENGTHS) + 1), (len(LENGTHS), 1)


def work(model: BlockModel, **arguments: Any) -> tuple[int, int]:
    """Blocks that an answer reused and computed; the answer is right."""
    answer = model.generate(PROMPT, OPTIONS, **arguments)
    assert list(answer.token_ids) == oracle_greedy(model, PROMPT, 4)
    return answer.usage.blocks_reused, answer.usage.blocks_computed


def test_views_share_the_model_and_none_of_the_blocks(make_model: Make) -> None:
    model = make_model()
    a, b = model.in_namespace("a"), model.in_namespace("b")
    assert [work(view) for view in (model, a, b)] == [COLD] * 3
    assert [work(view) for view in (model, a, b)] == [WARM] * 3
    assert len(list(model.store.keys())) == 3 * len(LENGTHS)
    for view in (a, b):
        assert view.model is model.model
        assert view.profile is model.profile
        assert view.fingerprint is model.fingerprint
        assert view.prompt_memory() == model.prompt_memory()
        assert view._worker is model._worker
        assert view._source.readers is model._source.readers
    assert (model.namespace, a.namespace, b.namespace) == ("", "a", "b")


def test_who_gives_the_same_name_shares(make_model: Make) -> None:
    model = make_model()
    assert work(model.in_namespace("a")) == COLD
    assert work(model.in_namespace("b").in_namespace("a")) == WARM
    assert work(make_model(namespace="a", store=model.store)) == WARM
    assert work(model.in_namespace("")) == COLD
    assert work(model) == WARM


def test_prompts_that_stay_composed_are_the_namespaces_own(make_model: Make) -> None:
    model = make_model(kept_bytes=1 << 28)
    a, b = model.in_namespace("a"), model.in_namespace("b")
    work(a)
    assert a.generate(PROMPT, OPTIONS).usage.blocks_kept == len(LENGTHS)
    usage = b.generate(PROMPT, OPTIONS).usage
    assert (usage.blocks_kept, usage.blocks_reused) == (0, 0)
    assert a.generate(PROMPT, OPTIONS).usage.blocks_kept == len(LENGTHS)
    # Documents that were deleted are forgotten by all.
    b.forget_kept()
    assert a.generate(PROMPT, OPTIONS).usage.blocks_kept == 0
    assert a.prompt_memory().kept_prompts == model.prompt_memory().kept_prompts == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is interpreted here")
def test_blocks_on_the_device_are_the_namespaces_own(make_model: Make) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    pool: DevicePool[Any] = DevicePool(1 << 22, "cpu")
    model = make_model(device_pool=pool)
    a, b = model.in_namespace("a"), model.in_namespace("b")
    work(a)
    keys = [[view.block_key(block.token_ids) for block in PROMPT.local_blocks] for view in (a, b)]
    assert pool.held(keys[0]) == set(keys[0])
    assert pool.held(keys[1]) == set()
    assert work(b) == COLD
    assert work(a) == WARM


class GatedStore(MemoryStore):
    """A memory store in which the threads of one name wait."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.asked = threading.Event(), threading.Event()

    def get_many(self, keys: Sequence[str]) -> Iterator[tuple[str, memoryview | None]]:
        if threading.current_thread().name.startswith("held"):
            self.asked.set()
            assert self.gate.wait(60)
        return super().get_many(keys)


def test_what_one_namespace_is_computing_is_not_waited_for_by_another(make_model: Make) -> None:
    store = GatedStore()
    model = make_model(store=store)
    a, b = model.in_namespace("a"), model.in_namespace("b")
    with ThreadPoolExecutor(1, thread_name_prefix="held") as held, ThreadPoolExecutor(1) as same:
        first = held.submit(work, a)
        assert store.asked.wait(60)
        assert work(b) == COLD, "while the other one is on its way"
        # The control: the same namespace waits for it.
        second = same.submit(work, model.in_namespace("a"))
        threading.Event().wait(0.2)
        assert not second.done()
        store.gate.set()
        assert first.result(60) == COLD
        assert second.result(60) == WARM


def test_views_answer_side_by_side(make_model: Make) -> None:
    model = make_model()
    views = [model.in_namespace(str(number)) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, views)) == [COLD] * 4
        assert list(pool.map(work, views)) == [WARM] * 4


@pytest.mark.parametrize("name", [None, 3, b"a"])
def test_a_name_is_a_string(make_model: Make, name: Any) -> None:
    with pytest.raises(InputError, match="a namespace is a string"):
        make_model().in_namespace(name)
    with pytest.raises(InputError, match="a namespace is a string"):
        make_model(namespace=name)
    with pytest.raises(InputError, match="lone surrogate"):
        make_model().in_namespace("\ud800")


def test_a_model_that_only_attends_in_full_has_namespaces_too() -> None:
    model = BlockModel(tiny_model(REFUSED_CASES[0]), plain_tokenizer(), attention="full")
    view = model.in_namespace("a")
    assert view.generate(PROMPT, OPTIONS).token_ids == model.generate(PROMPT, OPTIONS).token_ids


def test_an_index_ingests_and_asks_in_its_namespace() -> None:
    model = BlockModel.from_pretrained("demo", device="cpu", kept_bytes=0)
    passages = [Passage(f"p{number}", f"The river of valley {number} runs north.", "Rivers") for number in range(3)]
    options = GenerationOptions(max_new_tokens=4)
    rags = [BlockRAG(model.in_namespace(name), PassageIndex(LexicalEncoder())) for name in ("a", "b")]
    assert [rag.ingest(passages).blocks_new for rag in rags] == [3, 3]
    assert [rag.query("Where does the river run?", options).usage.blocks_computed for rag in rags] == [1, 1]
    # What one deletes the other one keeps.
    rags[0].delete("p0")
    assert rags[1].query("Where does the river run?", options, on_miss="error").usage.blocks_computed == 1


def test_a_pipeline_has_a_namespace(tmp_path: Path) -> None:
    with BlockRAG.from_pretrained("demo", path=tmp_path / "one", device="cpu", namespace="tenant") as rag:
        assert rag.model.namespace == "tenant"
        passage = Passage("p", "The river runs north.", "Rivers")
        assert rag.ingest([passage]).blocks_new == 1
        plain = rag.model.in_namespace("")
        block = plain.template.passage_block(plain.tokenizer, passage)
        assert rag.store.contains_many([plain.block_key(block.token_ids)]) == set()
        assert len(rag.store.contains_many([rag.model.block_key(block.token_ids)])) == 1
    assert ModelConfig(namespace="tenant") != ModelConfig()


# -- Servers -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> BlockModel:
    return BlockModel.from_pretrained("demo", device="cpu", kept_bytes=0, store=MemoryStore())


def asked(live: Any, **extra: Any) -> Any:
    return live.http.post(
        "/v1/chat/completions", json={"messages": [QUESTION], "documents": DOCUMENTS, "max_tokens": 2, **extra}
    )


def test_a_server_answers_in_its_own_namespace(demo: BlockModel) -> None:
    with live_server(demo.in_namespace("a")) as a, live_server(demo.in_namespace("b")) as b:
        assert asked(a).json()["blockrag"]["blocks_reused"] == 0
        assert asked(a).json()["blockrag"]["blocks_reused"] == 3
        assert asked(b).json()["blockrag"]["blocks_reused"] == 0


@pytest.mark.parametrize(
    "extra",
    [
        {"json": {"blockrag": {"namespace": "victim"}}},
        {"json": {"namespace": "victim"}},
        {"json": {"cache_salt": "victim"}},
        {"json": {"user": "victim"}},
        {"params": {"namespace": "victim"}},
        {"headers": {"namespace": "victim", "x-namespace": "victim"}},
    ],
    ids=["option", "field", "salt", "user", "query", "header"],
)
def test_a_client_cannot_choose_its_namespace(demo: BlockModel, extra: dict[str, Any], request: Any) -> None:
    body = {"messages": [QUESTION], "documents": DOCUMENTS, "max_tokens": 2}
    with live_server(demo.in_namespace("victim")) as victim:
        victim.http.post("/v1/chat/completions", json=body)
        assert victim.http.post("/v1/chat/completions", json=body).json()["blockrag"]["blocks_reused"] == 3
    with live_server(demo.in_namespace(f"attacker {request.node.name}")) as live:
        extra = {**extra, "json": {**body, **extra.get("json", {})}}
        reply = live.http.post("/v1/chat/completions", **extra)
        if reply.status_code == 200:
            assert reply.json()["blockrag"]["blocks_reused"] == 0
        else:
            assert (reply.status_code, "blocks_reused" in reply.text) == (400, False)


def test_a_server_with_a_namespace_lists_no_keys(demo: BlockModel) -> None:
    with live_server(demo.in_namespace("a")) as live:
        reply = live.http.get("/v1/blocks")
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "namespaced")
        made = live.http.post("/v1/blocks", json={"documents": DOCUMENTS}).json()["data"]
        # Who knows a key, from having the passage computed, may ask for it.
        assert live.http.get(f"/v1/blocks/{made[0]['key']}").json()["usable"] is True
    with live_server(demo) as live:
        assert live.http.get("/v1/blocks").status_code == 200


def test_the_command_line_keeps_namespaces_apart(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"blocks": ["The river runs north.", "Where does it run?"]}) + "\n")
    store = f"disk://{tmp_path / 'kv'}"

    def reused(number: int, *arguments: str) -> int:
        command = ["generate", "--model", "demo", "--input", str(tmp_path / "in.jsonl"), "--store", store]
        command += ["--output", str(tmp_path / f"out{number}.jsonl"), "--max-new-tokens", "2", "--json", *arguments]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        return int(json.loads(result.stdout)["usage"]["blocks_reused"])

    assert [reused(1), reused(2), reused(3, "--namespace", "a"), reused(4, "--namespace", "a")] == [0, 1, 0, 1]
    refused = CliRunner().invoke(app, ["serve", "--path", str(tmp_path), "--namespace", "a secret"])
    assert refused.exit_code == 2
    assert "--namespace is for a --store that several share" in refused.stderr
    assert "secret" not in refused.stderr


def test_errors_of_the_model_and_the_store_have_codes_of_their_own(demo: BlockModel) -> None:
    strict = demo.in_namespace("strict")
    strict.on_miss = "error"
    with live_server(strict) as live:
        reply = asked(live)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "blocks_missing")
        live.http.post("/v1/blocks", json={"documents": DOCUMENTS})
        assert asked(live).status_code == 200
    lenient = demo.in_namespace("lenient")
    lenient.on_miss = "full"
    with live_server(lenient) as live:
        assert asked(live).json()["blockrag"]["blocks_missing"] == 2
        assert live.metric("blockrag_blocks_total", kind="missing") == 2
