"""A store that was written for another model says what is different, once, and nothing about other tenants."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from test_exactness import QUERY, prompt_of
from tiny_tokenizers import plain_tokenizer

from blockrag.errors import StoreError
from blockrag.fingerprint import Fingerprint
from blockrag.model.block_model import BlockModel
from blockrag.model.sampling import GenerationOptions
from blockrag.stores import MemoryStore, open_store

Make = Callable[..., BlockModel]

LENGTHS = (7, 12, 9, 1)
PROMPT = prompt_of(LENGTHS, QUERY)
OPTIONS = GenerationOptions(max_new_tokens=2, ignore_eos=True)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def other_tokenizer(make_model: Make, **arguments: Any) -> BlockModel:
    """The same model with a token more."""
    model = make_model(**arguments)
    tokenizer = plain_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    return BlockModel(
        model.model,
        tokenizer,
        template=model.template,
        facts=model.facts,
        precision=model.precision,
        kept_bytes=0,
        namespace=model.namespace,
    )


def test_a_store_knows_who_wrote_to_it(make_model: Make) -> None:
    store = MemoryStore()
    model = make_model()
    assert model.explain_misses(store) is None, "nobody wrote yet"
    model.generate(PROMPT, OPTIONS, store=store)
    assert store.fingerprints() == {model.fingerprint.digest: model.fingerprint}
    assert model.explain_misses(store) is None
    make_model(precision="int8").materialize(PROMPT.local_blocks, store)
    assert len(store.fingerprints()) == 2


def test_reading_alone_is_not_remembered(make_model: Make) -> None:
    store, model = MemoryStore(), make_model()
    model.generate(PROMPT, OPTIONS, store=store)
    assert store.fingerprints().keys() == {model.fingerprint.digest}
    other = make_model(precision="int8")
    other.generate(PROMPT, OPTIONS, store=store, on_miss="full")
    assert store.fingerprints().keys() == {model.fingerprint.digest}, "it has written nothing"


@pytest.mark.parametrize("how", ["generate", "batch", "materialize", "full"])
def test_what_changed_is_said_once_per_store(make_model: Make, caplog: pytest.LogCaptureFixture, how: str) -> None:
    store = MemoryStore()
    before, now = make_model(), other_tokenizer(make_model)
    before.generate(PROMPT, OPTIONS, store=store)

    def ask(model: BlockModel, lengths: tuple[int, ...]) -> None:
        prompt = prompt_of(lengths, QUERY)
        if how == "materialize":
            model.materialize(prompt.local_blocks, store)
        elif how == "batch":
            model.generate([prompt, prompt], OPTIONS, store=store)
        else:
            model.generate(prompt, OPTIONS, store=store, on_miss="full" if how == "full" else "compute")

    with caplog.at_level(logging.WARNING, logger="blockrag.model.misses"):
        ask(now, LENGTHS)
        ask(now, (3, 5))
        ask(before, (3, 5))
    (said,) = [message for message in warnings_of(caplog) if "fingerprint" in message]
    stored, asked = before.fingerprint.tokenizer[:8], now.fingerprint.tokenizer[:8]
    assert f"stored for tokenizer {stored}..., asked with {asked}..." in said
    assert "4 of the 4 missing blocks are stored under it" in said


def test_a_precision_is_named_by_itself(make_model: Make) -> None:
    store = MemoryStore()
    make_model(precision="float16").materialize(PROMPT.local_blocks, store)
    explained = make_model(precision="int8").explain_misses(store, PROMPT.local_blocks[:3])
    assert explained is not None
    assert [str(change) for change in explained.changes] == ["stored for precision float16, asked with int8"]
    assert (explained.asked, explained.stored) == (3, 3)
    assert str(explained).endswith(
        "stored for precision float16, asked with int8; 3 of the 3 missing blocks are stored under it"
    )


def test_another_model_is_called_that(make_model: Make) -> None:
    store = MemoryStore()
    make_model("qwen3").materialize(PROMPT.local_blocks, store)
    explained = make_model("mistral", precision="int8").explain_misses(store)
    assert explained is not None
    assert str(explained).endswith("another model's, for weights, config, precision, attention differ")


def test_the_nearest_of_several_is_named(make_model: Make) -> None:
    store = MemoryStore()
    for case, precision in (("qwen2", "float32"), ("llama", "int8"), ("mistral", "float16")):
        make_model(case, precision=precision).materialize(PROMPT.local_blocks, store)
    nearest = make_model("llama", precision="int8").fingerprint
    explained = make_model("llama").explain_misses(store, PROMPT.local_blocks)
    assert explained is not None
    assert explained.fingerprint == nearest.digest
    assert [change.name for change in explained.changes] == ["precision"]


def test_blocks_that_were_never_stored_are_not_blamed_on_the_change(make_model: Make) -> None:
    store = MemoryStore()
    make_model().generate(PROMPT, OPTIONS, store=store)
    explained = other_tokenizer(make_model).explain_misses(store, prompt_of((3, 5), QUERY, seed=2).local_blocks)
    assert explained is not None
    assert (explained.asked, explained.stored) == (2, 0)
    assert "stored under it" not in str(explained)


def test_other_namespaces_are_neither_looked_into_nor_named(make_model: Make) -> None:
    """What an explanation says must not depend on what another namespace holds, and not name it."""
    holding, empty = MemoryStore(), MemoryStore()
    secret = make_model(namespace="secret tenant")
    secret.generate(PROMPT, OPTIONS, store=holding)
    secret.generate(prompt_of((2,), QUERY, seed=4), OPTIONS, store=empty)
    asked: list[set[str]] = []

    class Watched(MemoryStore):
        def contains_many(self, keys: Iterable[str]) -> set[str]:
            wanted = set(keys)
            asked.append(wanted)
            return holding.contains_many(wanted)

        def fingerprints(self) -> dict[str, Fingerprint]:
            return holding.fingerprints()

    for namespace in ("", "another"):
        now = other_tokenizer(make_model, namespace=namespace)
        explanations = [now.explain_misses(store, PROMPT.local_blocks) for store in (Watched(), empty)]
        assert explanations[0] == explanations[1]
        assert explanations[0] is not None
        assert explanations[0].stored == 0
        assert "secret" not in repr(explanations[0])
    theirs = {secret.block_key(block.token_ids) for block in PROMPT.local_blocks}
    assert asked
    assert not set().union(*asked) & theirs
    # The control: in the same namespace they are found.
    explained = other_tokenizer(make_model, namespace="secret tenant").explain_misses(holding, PROMPT.local_blocks)
    assert explained is not None
    assert explained.stored == len(LENGTHS)


def test_another_process_is_told_too(make_model: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A directory that was written, closed and opened again knows whom it was written for."""
    url = f"disk://{tmp_path / 'kv'}"
    first = open_store(url)
    make_model(precision="float16").materialize(PROMPT.local_blocks, first)
    first.close()
    again = open_store(url)
    try:
        with caplog.at_level(logging.WARNING, logger="blockrag"):
            make_model(precision="bfloat16").generate(PROMPT, OPTIONS, store=again)
        assert [message for message in warnings_of(caplog) if "precision float16, asked with bfloat16" in message]
        assert len(again.fingerprints()) == 2
    finally:
        again.close()


def test_a_store_that_cannot_say_costs_nobody_an_answer(make_model: Make) -> None:
    class Mute(MemoryStore):
        def fingerprints(self) -> dict[str, Fingerprint]:
            raise StoreError("the manifest is unreadable")

    store, model = Mute(), make_model()
    usage = model.generate(PROMPT, OPTIONS, store=store).usage
    assert (usage.blocks_computed, usage.store_failures) == (len(LENGTHS) + 1, 0)
    with pytest.raises(StoreError, match="manifest"):
        model.explain_misses(store)


def test_a_store_that_could_not_say_is_asked_again(make_model: Make, caplog: pytest.LogCaptureFixture) -> None:
    class Away(MemoryStore):
        """Behind a network that comes and goes."""

        here = True

        def fingerprints(self) -> dict[str, Fingerprint]:
            self._answer()
            return super().fingerprints()

        def remember_fingerprint(self, fingerprint: Fingerprint) -> None:
            self._answer()
            super().remember_fingerprint(fingerprint)

        def _answer(self) -> None:
            if not self.here:
                raise StoreError("the store does not answer")

    def explanations() -> list[str]:
        return [message for message in warnings_of(caplog) if "stored for tokenizer" in message]

    store, before, now = Away(), make_model(), other_tokenizer(make_model)
    before.generate(PROMPT, OPTIONS, store=store)
    with caplog.at_level(logging.WARNING, logger="blockrag.model.misses"):
        store.here = False
        now.generate(prompt_of((3, 5), QUERY), OPTIONS, store=store)
        assert not explanations()
        store.here = True
        now.generate(prompt_of((4, 6), QUERY), OPTIONS, store=store)
        now.generate(prompt_of((8, 2), QUERY), OPTIONS, store=store)
    assert len(explanations()) == 1
