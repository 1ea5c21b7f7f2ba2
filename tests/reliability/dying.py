"""Ingestion that is killed, at a random moment or before a chosen call of the store, and goes on in another process.

Run in a process of its own by `fresh`: the libraries are imported and the model is built once, and every pass runs in
a fork made before they are used.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from fresh import Ended, forked
from tiny_models import ModelCase, tiny_model
from tiny_tokenizers import plain_tokenizer

from blockrag.encoders import LexicalEncoder
from blockrag.index import PassageIndex
from blockrag.ingest import Document, ingest
from blockrag.model.block_model import BlockModel
from blockrag.model.facts import BlockAttentionFacts
from blockrag.model.sampling import GenerationOptions
from blockrag.rag import BlockRAG
from blockrag.stores import DiskStore
from blockrag.stores.files import StoreFiles

__all__ = ["kill_at_calls", "kill_at_random"]

# Long ones get files of their own, short ones lie in the index: a token takes 512 bytes.
_SENTENCES = (
    "The river runs from the lake to the sea.",
    "Ada Lovelace was an English mathematician and writer.",
    "The Analytical Engine was a proposed mechanical computer.",
)
_DOCUMENTS = [
    Document(
        f"d{number}", " ".join(_SENTENCES[(number + turn) % 3] for turn in range(1 + 3 * (number % 4))), f"No. {number}"
    )
    for number in range(14)
]
_QUESTION = "Where does the river run?"
_OPTIONS = GenerationOptions(max_new_tokens=2)
_BUDGET = 10_000_000


class OneByOne(BlockModel):
    """Computes every block in a forward of its own, so that its bits do not depend on what else was missing."""

    @property
    def _batch_tokens(self) -> int:
        return 1


class DyingFiles(StoreFiles):
    """Counts the store's calls, and ends the process before a chosen one, as a power cut would."""

    def __init__(self, dies_at: int | None) -> None:
        super().__init__()
        self.calls = 0
        self._dies_at = dies_at

    def before(self, call: str) -> None:
        self.calls += 1
        if self.calls == self._dies_at:
            os.kill(os.getpid(), signal.SIGKILL)


class Passes:
    """Passes over the same documents into directories of their own, in forks of this process."""

    def __init__(self, directory: str) -> None:
        self._directory = Path(directory)
        self._weights = tiny_model(ModelCase("two layers", "llama", {"num_hidden_layers": 2}))
        self._tokenizer = plain_tokenizer()
        self.directories = self.kills = 0
        self.new_directory()
        self.expected = self.run().result
        # What is imported when it is needed is imported once, not in every fork.
        for name in self.expected.pop("modules"):
            importlib.import_module(name)
        assert len(self.expected["blocks"]) >= len(_DOCUMENTS)
        started = time.monotonic()
        self.new_directory()
        self.calls = self.run().result["calls"]
        self.seconds = time.monotonic() - started
        del self.expected["calls"]

    def new_directory(self) -> None:
        """Later passes go into a new, empty directory; the last one is removed."""
        shutil.rmtree(self._directory / str(self.directories), ignore_errors=True)
        self.directories += 1

    def run(self, *, kill_after_s: float | None = None, dies_at: int | None = None) -> Ended:
        """Check what is there, ingest, and answer; possibly killed on the way."""
        state = self._directory / str(self.directories)
        state.mkdir(parents=True, exist_ok=True)
        ended = forked(lambda: self._pass(state, DyingFiles(dies_at)), kill_after_s=kill_after_s)
        self.kills += ended.signal != 0
        return ended

    def finish(self) -> None:
        """A pass that nobody kills; it must end with what a pass that was never killed ends with."""
        result = self.run().result
        assert {name: result[name] for name in self.expected} == self.expected

    def _pass(self, state: Path, files: DyingFiles) -> dict[str, Any]:
        before = set(sys.modules)
        with contextlib.closing(DiskStore(state / "kv", max_bytes=_BUDGET, files=files)) as store:
            faults = [fault for fault in store.verify().faults if fault.kind != "stray"]
            assert not faults, f"after a kill: {faults}"
            model = OneByOne(
                self._weights,
                self._tokenizer,
                facts=BlockAttentionFacts(block_fine_tuned=True),
                precision="float32",
                store=store,
                kept_bytes=0,
            )
            with PassageIndex(LexicalEncoder(64), state / "index") as index:
                lost = index.block_keys() - set(store.keys())
                assert not lost, f"after a kill the index names blocks that are not stored: {lost}"
                report = ingest(_DOCUMENTS, index=index, model=model, store=store, batch_documents=4)
                assert not report.failures
                calls = files.calls
                answer = BlockRAG(model, index, top_k=3).query(_QUESTION, _OPTIONS)
                assert answer.usage.blocks_damaged == 0
                stored = store.get_many(sorted(store.keys()))
                return {
                    "blocks": {key: hashlib.sha256(data or b"").hexdigest() for key, data in stored},
                    "answer": answer.text,
                    "calls": calls,
                    "modules": sorted(set(sys.modules) - before),
                }


def kill_at_random(directory: str, kills: int, seed: int) -> dict[str, int]:
    """Kill passes at random moments; now and then let one end, and compare. Returns "kills" and "resumed"."""
    passes, random_numbers = Passes(directory), random.Random(seed)
    resumed = 0
    while passes.kills < kills:
        passes.new_directory()
        # Each directory dies several times before a pass ends by itself or is let go.
        for _ in range(4):
            passes.run(kill_after_s=random_numbers.random() * passes.seconds)
        passes.finish()
        resumed += 1
    return {"kills": passes.kills, "resumed": resumed}


def kill_at_calls(directory: str, kills: int) -> dict[str, int]:
    """Kill a pass before the n-th call of the store, evenly over all of them or each of them; let the next one end.

    Returns:
        "kills", "resumed", and "calls" there are in a pass.
    """
    passes = Passes(directory)
    step = max(1, -(-passes.calls // kills))
    resumed = 0
    for call in range(1, passes.calls + 1, step):
        passes.new_directory()
        assert passes.run(dies_at=call).signal == signal.SIGKILL
        passes.finish()
        resumed += 1
    return {"kills": passes.kills, "resumed": resumed, "calls": passes.calls}
