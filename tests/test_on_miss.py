"""What happens where passages are not stored, where the store fails, and where the model computes what is no number."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import pytest
import torch
from test_exactness import QUERY, oracle_greedy, prompt_of
from tiny_models import CASES, ModelCase, tiny_model
from tiny_tokenizers import plain_tokenizer
from typer.testing import CliRunner

from blockrag.cli import app
from blockrag.codec import Precision
from blockrag.encoders.lexical import LexicalEncoder
from blockrag.errors import InputError, MissingBlockError, NotFiniteError, StoreError, UnsafeStoreError
from blockrag.fingerprint import Fingerprint
from blockrag.index import PassageIndex
from blockrag.model.block_model import BlockModel
from blockrag.model.facts import BlockAttentionFacts
from blockrag.model.running import OnMiss
from blockrag.model.sampling import GenerationOptions
from blockrag.passage import Passage
from blockrag.prompt import Block, SegmentedPrompt
from blockrag.rag import BlockRAG
from blockrag.stores import DiskStore, MemoryStore

Make = Callable[..., BlockModel]

LENGTHS = (7, 12, 9, 1)
PROMPT = prompt_of(LENGTHS, QUERY)
OPTIONS = GenerationOptions(max_new_tokens=6, ignore_eos=True)
LLAMA = CASES[0]
FINE_TUNED = BlockAttentionFacts(block_fine_tuned=True)
PREFIX = Block((5, 6, 7), "prefix", local=True, kind="prefix")
NAMED = SegmentedPrompt(
    (
        PREFIX,
        *(
            Block(block.token_ids, block.text, local=True, kind="passage", source=f"doc-{number}")
            for number, block in enumerate(PROMPT.local_blocks)
        ),
        PROMPT.blocks[-1],
    )
)


class FailingStore(MemoryStore):
    """A memory store whose calls fail as told: by name, from the n-th on."""

    def __init__(self, error: StoreError | None = None, max_bytes: int | None = None) -> None:
        super().__init__(max_bytes)
        self.failing: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        self.error = error or StoreError("the medium is gone")

    def _call(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        if self.calls[name] >= self.failing.get(name, 1 << 30):
            raise self.error

    def get(self, key: str) -> memoryview | None:
        self._call("get")
        return super().get(key)

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        self._call("put")
        super().put(key, data)

    def contains_many(self, keys: Iterable[str]) -> set[str]:
        self._call("contains_many")
        return super().contains_many(keys)

    def remember_fingerprint(self, fingerprint: Fingerprint) -> None:
        self._call("remember_fingerprint")
        super().remember_fingerprint(fingerprint)

    def fingerprints(self) -> dict[str, Fingerprint]:
        self._call("fingerprints")
        return super().fingerprints()


def full_greedy(model: BlockModel, prompt: SegmentedPrompt) -> list[int]:
    return list(model.generate(prompt, OPTIONS, attention="full").token_ids)


def store_of(model: BlockModel, prompt: SegmentedPrompt, *, without: int | None = None) -> MemoryStore:
    """A store with the blocks of a prompt, one of them left out."""
    store = MemoryStore()
    model.materialize([block for place, block in enumerate(prompt.local_blocks) if place != without], store)
    return store


def damage(store: MemoryStore, key: str) -> None:
    data = store.get(key)
    assert data is not None
    data[-1] ^= 1


# -- Passages that are not stored ------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_miss", ["compute", "full", "error"])
def test_nothing_differs_where_everything_is_stored(make_model: Make, on_miss: OnMiss) -> None:
    model = make_model()
    store = store_of(model, NAMED)
    answer = model.generate(NAMED, OPTIONS, store=store, on_miss=on_miss)
    assert list(answer.token_ids) == oracle_greedy(model, NAMED, 6)
    assert (answer.usage.blocks_reused, answer.usage.blocks_computed, answer.usage.blocks_missing) == (5, 1, 0)


@pytest.mark.parametrize("how", ["missing", "damaged", "unreadable"])
def test_full_answers_as_if_nothing_were_stored(make_model: Make, how: str, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    store = store_of(model, NAMED, without=2 if how == "missing" else None)
    key = model.block_key(NAMED.blocks[2].token_ids)
    if how == "damaged":
        damage(store, key)
    if how == "unreadable":
        failing = FailingStore()
        model.materialize(NAMED.local_blocks, failing)
        failing.failing["get"] = 3
        store = failing
    stored = set(store.keys())
    with caplog.at_level(logging.WARNING, logger="blockrag"):
        answer = model.generate(NAMED, OPTIONS, store=store, on_miss="full")
    assert list(answer.token_ids) == full_greedy(model, NAMED)
    usage = answer.usage
    assert (usage.blocks_reused, usage.tokens_reused, usage.blocks_computed) == (0, 0, 1)
    assert usage.tokens_computed == NAMED.num_tokens
    assert usage.blocks_missing == (3 if how == "unreadable" else 1)
    assert (usage.blocks_damaged, usage.store_failures) == ((how == "damaged"), 3 if how == "unreadable" else 0)
    assert "answered in full attention: " in caplog.text
    # Nothing is computed for the store; what is damaged goes, so that the next ingestion brings it back.
    assert set(store.keys()) == stored - ({key} if how == "damaged" else set())


def test_a_missing_prefix_is_computed_whatever_is_asked(make_model: Make) -> None:
    model = make_model()
    for on_miss in ("full", "error"):
        store = store_of(model, NAMED, without=0)
        answer = model.generate(NAMED, OPTIONS, store=store, on_miss=on_miss)
        assert list(answer.token_ids) == oracle_greedy(model, NAMED, 6)
        assert (answer.usage.blocks_reused, answer.usage.blocks_computed) == (4, 2)
        assert set(store.contains_many([model.block_key(PREFIX.token_ids)])), "and stored"


class CountingModel:
    """Counts the forwards of a model."""

    def __init__(self, model: BlockModel) -> None:
        self.forwards = 0
        self._handle = model.model.base_model.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self.forwards += 1

    def __enter__(self) -> CountingModel:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


@pytest.mark.parametrize("how", ["missing", "damaged", "unreadable"])
def test_error_names_the_passages_before_anything_is_computed(make_model: Make, how: str) -> None:
    model = make_model()
    store = store_of(model, NAMED)
    gone = [model.block_key(NAMED.blocks[place].token_ids) for place in (1, 3)]
    if how == "missing":
        store.delete_many(gone)
    elif how == "damaged":
        for key in gone:
            damage(store, key)
    else:
        failing = FailingStore()
        model.materialize(NAMED.local_blocks, failing)
        failing.failing["contains_many"] = failing.calls["contains_many"] + 1
        store = failing
    with CountingModel(model) as counting, pytest.raises(MissingBlockError) as caught:
        model.generate(NAMED, OPTIONS, store=store, on_miss="error")
    assert counting.forwards == 0
    assert caught.value.sources == (("doc-0", "doc-2") if how != "unreadable" else ("doc-0", "doc-1", "doc-2", "doc-3"))
    assert str(caught.value).startswith(f"{len(caught.value.sources)} passages of this prompt are not stored")
    assert "'doc-0'" in str(caught.value)
    if how != "unreadable":
        assert store.contains_many(gone) == set()
        assert model.materialize(NAMED.local_blocks, store).blocks_new == 2
        model.generate(NAMED, OPTIONS, store=store, on_miss="error")


def test_a_batch_is_answered_whole_or_not_at_all(make_model: Make) -> None:
    model = make_model()
    other = prompt_of((6, 4), QUERY, seed=9)
    store = store_of(model, NAMED)
    with CountingModel(model) as counting, pytest.raises(MissingBlockError, match="2 passages"):
        model.generate([NAMED, other], OPTIONS, store=store, on_miss="error")
    assert counting.forwards == 0
    answers = model.generate([NAMED, other], OPTIONS, store=store, on_miss="full")
    assert [answer.usage.blocks_missing for answer in answers] == [0, 2]
    assert list(answers[0].token_ids) == oracle_greedy(model, NAMED, 6)
    assert list(answers[1].token_ids) == full_greedy(model, other)
    model.materialize(other.local_blocks, store)
    answers = model.generate([NAMED, other], OPTIONS, store=store, on_miss="error")
    assert [answer.usage.blocks_reused for answer in answers] == [5, 2]


def test_passages_that_are_still_composed_count_as_there(make_model: Make) -> None:
    model = make_model(kept_bytes=1 << 28, on_miss="error")
    store = store_of(model, NAMED)
    first = model.generate(NAMED, OPTIONS, store=store)
    store.delete_many(list(store.keys()))
    again = model.generate(NAMED, OPTIONS, store=store)
    assert (again.token_ids, again.usage.blocks_kept) == (first.token_ids, 5)
    model.forget_kept()
    with pytest.raises(MissingBlockError):
        model.generate(NAMED, OPTIONS, store=store)


def test_a_prompt_that_failed_can_be_asked_again(make_model: Make) -> None:
    """Nothing of the failed attempt stays: neither in the running prompt nor in what is kept for the next one."""
    model = make_model(kept_bytes=1 << 28)
    store = store_of(model, NAMED)
    damage(store, model.block_key(NAMED.blocks[2].token_ids))
    running = model.start(store=store, on_miss="error")
    with pytest.raises(MissingBlockError):
        running.extend(NAMED.blocks, room=6)
    assert (running.token_ids, running.cache) == ([], None)
    model.materialize(NAMED.local_blocks, store)
    running.extend(NAMED.blocks, room=6)
    list(running.answer(OPTIONS, ()))
    assert running.token_ids[-6:] == oracle_greedy(model, NAMED, 6)
    running.close()
    assert list(model.generate(NAMED, OPTIONS, store=store).token_ids) == oracle_greedy(model, NAMED, 6)


@pytest.mark.parametrize("on_miss", ["full", "error"])
def test_a_conversation_whose_next_passages_are_missing(make_model: Make, on_miss: OnMiss) -> None:
    model = make_model()
    store = store_of(model, NAMED)
    more = prompt_of((6, 4), 5, seed=9)
    running = model.start(store=store, on_miss=on_miss)
    running.extend(NAMED.blocks, room=20)
    list(running.answer(OPTIONS, ()))
    said = list(running.token_ids)
    if on_miss == "error":
        with pytest.raises(MissingBlockError, match="2 passages"):
            running.extend(more.blocks, room=6)
        assert running.token_ids == said, "the conversation goes on without them"
        running.extend(more.blocks[-1:], room=6)
        blocks = [*NAMED.blocks, _said(said[NAMED.num_tokens :]), more.blocks[-1]]
    else:
        running.extend(more.blocks, room=6)
        assert running.usage.blocks_missing == 2
        assert running.usage.blocks_reused == 0
        blocks = [*NAMED.blocks, _said(said[NAMED.num_tokens :]), *(block.as_global() for block in more.blocks)]
    expected = model.reference_logits(blocks)[-1]
    assert running.logits is not None
    assert (running.logits - expected).abs().max() < 1e-4
    running.close()


def test_a_conversation_recomputes_what_turns_out_damaged_later(make_model: Make) -> None:
    model = make_model()
    store = store_of(model, NAMED)
    more = prompt_of((6, 4), 5, seed=9)
    model.materialize(more.local_blocks, store)
    damage(store, model.block_key(more.blocks[1].token_ids))
    running = model.start(store=store, on_miss="full")
    running.extend(NAMED.blocks, room=20)
    list(running.answer(OPTIONS, ()))
    said = running.token_ids[NAMED.num_tokens :]
    running.extend(more.blocks, room=6)
    assert (running.usage.blocks_damaged, running.usage.blocks_missing) == (1, 0)
    expected = model.reference_logits([*NAMED.blocks, _said(said), *more.blocks])[-1]
    assert running.logits is not None
    assert (running.logits - expected).abs().max() < 1e-4


def test_a_prompt_that_broke_halfway_is_not_continued(make_model: Make) -> None:
    model = make_model()
    store = store_of(model, NAMED)
    more = prompt_of((6, 4), 5, seed=9)
    model.materialize(more.local_blocks, store)
    damage(store, model.block_key(more.blocks[1].token_ids))
    running = model.start(store=store, on_miss="error")
    running.extend(NAMED.blocks, room=20)
    with pytest.raises(MissingBlockError):
        running.extend(more.blocks, room=6)
    with pytest.raises(InputError, match="start another"):
        running.extend(more.blocks, room=6)
    running.close()


def _said(token_ids: Sequence[int]) -> Block:
    return Block(tuple(token_ids), "", local=False, kind="answer")


def test_the_choice_is_checked(make_model: Make) -> None:
    with pytest.raises(InputError, match="on_miss='never'"):
        make_model(on_miss="never")
    with pytest.raises(InputError, match="on_miss='never'"):
        make_model().generate(NAMED, OPTIONS, on_miss="never")  # type: ignore[call-overload]


def test_a_rag_takes_the_choice_with_every_question() -> None:
    model = BlockModel.from_pretrained("demo", device="cpu", kept_bytes=0)
    rag = BlockRAG(model, PassageIndex(LexicalEncoder()))
    rag.ingest([Passage(f"p{number}", f"The river of valley {number} runs north.", "Rivers") for number in range(3)])
    options = GenerationOptions(max_new_tokens=4)
    assert rag.query("Where does the river run?", options, on_miss="error").usage.blocks_reused == 4
    rag.store.delete_many(list(rag.store.keys()))
    with pytest.raises(MissingBlockError) as caught:
        rag.query("Where does the river run?", options, on_miss="error")
    assert sorted(caught.value.sources) == ["p0", "p1", "p2"]
    answer = rag.query("Where does the river run?", options, on_miss="full")
    assert (answer.usage.blocks_missing, answer.usage.blocks_reused) == (3, 0)
    assert answer.text == rag.query("Where does the river run?", options, attention="full").text
    with rag.chat(on_miss="error") as chat, pytest.raises(MissingBlockError):
        chat.query("Where does the river run?", options)


def test_the_command_line_takes_the_choice(tmp_path: Path) -> None:
    (tmp_path / "doc.txt").write_text("The river of the valley runs north.")
    path = tmp_path / "index"
    command = ["query", "Where does the river run?", "--path", str(path), "--max-new-tokens", "4", "--json"]

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        result = CliRunner().invoke(app, [*arguments])
        return result.exit_code, json.loads(result.stdout)

    assert run("ingest", str(tmp_path / "doc.txt"), "--path", str(path), "--json")[0] == 0
    assert run(*command, "--on-miss", "error")[0] == 0
    with closing(DiskStore(path / "kv")) as store:
        store.delete_many(list(store.keys()))
        (digest,) = store.fingerprints()
    assert run("stats", "--path", str(path), "--json")[1]["store"]["fingerprints"] == [digest]
    assert f"{digest[:8]}... (float32, float16)" in CliRunner().invoke(app, ["stats", "--path", str(path)]).stdout
    code, said = run(*command, "--on-miss", "error")
    assert code != 0
    assert "1 passages of this prompt are not stored" in said["error"]["message"]
    code, said = run(*command, "--on-miss", "full")
    assert (code, said["usage"]["blocks_missing"], said["usage"]["blocks_reused"]) == (0, 1, 0)
    said_to_people = CliRunner().invoke(app, [*command[:-1], "--on-miss", "full"]).stdout
    assert "in full attention, for 1 passages are not stored" in said_to_people
    code, said = run(*command)
    assert (code, said["usage"]["blocks_missing"]) == (0, 0)


# -- Stores that fail --------------------------------------------------------------------------------------------------


def test_a_store_that_cannot_be_read_costs_time_and_is_counted(
    make_model: Make, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    store = FailingStore()
    model.materialize(PROMPT.local_blocks, store)
    store.failing["get"] = 1
    with caplog.at_level(logging.WARNING, logger="blockrag"):
        answer = model.generate(PROMPT, OPTIONS, store=store)
    assert list(answer.token_ids) == oracle_greedy(model, PROMPT, 6)
    assert (answer.usage.blocks_reused, answer.usage.blocks_computed) == (0, len(LENGTHS) + 1)
    assert answer.usage.store_failures == len(LENGTHS)
    assert [record.message for record in caplog.records if "the medium is gone" in record.message] == [
        f"{len(LENGTHS)} blocks are computed, because the store cannot read them: the medium is gone"
    ]
    store.failing.clear()
    assert model.generate(PROMPT, OPTIONS, store=store).usage.blocks_reused == len(LENGTHS)


def test_a_store_that_fails_in_the_middle_is_read_as_far_as_it_goes(make_model: Make) -> None:
    model = make_model()
    store = FailingStore()
    model.materialize(PROMPT.local_blocks, store)
    store.failing["get"] = 3
    usage = model.generate(PROMPT, OPTIONS, store=store).usage
    assert (usage.blocks_reused, usage.blocks_computed, usage.store_failures) == (2, 3, 2)


def test_what_cannot_be_written_is_counted_and_said_once(make_model: Make, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    store = FailingStore()
    store.failing |= {"put": 1, "remember_fingerprint": 1}
    with caplog.at_level(logging.WARNING, logger="blockrag"):
        answer = model.generate(PROMPT, OPTIONS, store=store)
    assert list(answer.token_ids) == oracle_greedy(model, PROMPT, 6)
    assert answer.usage.store_failures == len(LENGTHS) + 1
    assert len([record for record in caplog.records if "the medium is gone" in record.message]) == 1
    with pytest.raises(StoreError, match="the medium is gone"):
        model.materialize(PROMPT.local_blocks, store)


@pytest.mark.parametrize("call", ["contains_many", "get", "put"])
def test_a_batch_outlives_a_store_that_fails(make_model: Make, call: str) -> None:
    model = make_model()
    store = FailingStore()
    if call == "get":
        model.materialize(PROMPT.local_blocks, store)
    store.failing[call] = store.calls.get(call, 0) + 1
    other = prompt_of((3,), 4, seed=2)
    answers = model.generate([PROMPT, other], OPTIONS, store=store)
    for prompt, answer in zip((PROMPT, other), answers, strict=True):
        assert list(answer.token_ids) == oracle_greedy(model, prompt, 6)
    assert sum(answer.usage.store_failures for answer in answers) >= 1


@pytest.mark.parametrize("call", ["get", "put", "contains_many", "remember_fingerprint", "fingerprints"])
def test_an_unsafe_store_is_never_worked_around(make_model: Make, call: str) -> None:
    store = FailingStore(UnsafeStoreError("a pickled row"))
    store.failing[call] = 1
    with pytest.raises(UnsafeStoreError, match="a pickled row"):
        make_model().generate([PROMPT, PROMPT], OPTIONS, store=store)
    if call != "contains_many":
        with pytest.raises(UnsafeStoreError, match="a pickled row"):
            make_model().generate(PROMPT, OPTIONS, store=store)


class WatchedStore(MemoryStore):
    """Notes what is pinned while something is written."""

    def __init__(self, max_bytes: int | None = None) -> None:
        super().__init__(max_bytes)
        self.pinned_at_put: list[set[str]] = []
        self.now: set[str] = set()

    def pinned(self, keys: Iterable[str]) -> AbstractContextManager[None]:
        self.now = set(keys)
        return super().pinned(self.now)

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        self.pinned_at_put.append(self.now)
        super().put(key, data)


def test_a_prompts_blocks_are_pinned_while_the_missing_ones_are_stored(make_model: Make) -> None:
    """In a store with room for all of them but one byte, the block that is computed does not push one out unread."""
    model = make_model()
    whole = store_of(model, PROMPT)
    size = whole.stats().bytes
    assert size is not None
    store = WatchedStore(max_bytes=size - 1)
    model.materialize(PROMPT.local_blocks[:-1], store)
    answer = model.generate(PROMPT, OPTIONS, store=store)
    assert list(answer.token_ids) == oracle_greedy(model, PROMPT, 6)
    assert store.pinned_at_put[-1] == {model.block_key(block.token_ids) for block in PROMPT.local_blocks}
    assert (answer.usage.blocks_reused, answer.usage.store_failures) == (3, 1), "there was no room beside the pinned"
    assert store.stats().evictions == 0
    model.materialize(prompt_of((3, 20), 4, seed=2).local_blocks, store)
    assert store.stats().evictions > 0, "afterwards nothing is pinned any more"


# -- What is no number -------------------------------------------------------------------------------------------------


def broken(layer: int, part: str, value: float) -> BlockModel:
    """A model whose keys or values of one layer are not finite, by a weight of its own."""
    model = tiny_model(ModelCase("llama", "llama", {"attention_bias": True}))
    wrapped = BlockModel(model, plain_tokenizer(), facts=FINE_TUNED, kept_bytes=0)
    projection = model.base_model.layers[layer].self_attn
    with torch.no_grad():
        (projection.k_proj if part == "keys" else projection.v_proj).bias[5] = value
    return wrapped


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("layer", range(4))
def test_states_that_are_not_finite_are_refused_with_their_layer(layer: int, part: str, value: float) -> None:
    model = broken(layer, part, value)
    for ask in (
        lambda: model.generate(PROMPT, OPTIONS),
        lambda: model.generate([PROMPT, PROMPT], OPTIONS),
        lambda: model.materialize(PROMPT.local_blocks),
    ):
        with pytest.raises(NotFiniteError, match=f"layer {layer}: the {part} hold NaN or infinity"):
            ask()
    assert list(model.store.keys()) == []


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16", "int8", "int4"])
def test_no_precision_hides_what_is_not_finite(precision: Precision) -> None:
    model = broken(2, "keys", float("nan"))
    model.precision = precision
    with pytest.raises(NotFiniteError, match="layer 2: the keys"):
        model.materialize(PROMPT.local_blocks)


def test_ingestion_reports_the_documents_whose_states_are_not_finite() -> None:
    model = BlockModel.from_pretrained("demo", device="cpu", kept_bytes=0)
    with torch.no_grad():
        model.model.base_model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    rag = BlockRAG(model, PassageIndex(LexicalEncoder()))
    passages = [Passage(f"p{number}", f"The river of valley {number}.", "Rivers") for number in range(2)]
    with pytest.raises(NotFiniteError, match="layer 1: the values"):
        # The prefix, which every prompt needs.
        rag.ingest(passages)
    with pytest.raises(NotFiniteError, match="layer 1: the values"):
        rag.query("Where is the river?")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("attention", ["block", "full"])
def test_no_answer_is_made_from_logits_that_are_not_finite(
    make_model: Make, attention: Any, temperature: float
) -> None:
    """The last layer's states are stored before what breaks down behind them."""
    model = BlockModel(tiny_model(LLAMA), plain_tokenizer(), facts=FINE_TUNED, kept_bytes=0)
    with torch.no_grad():
        model.model.base_model.norm.weight[3] = float("nan")
    options = GenerationOptions(max_new_tokens=3, temperature=temperature, seed=1)
    model.materialize(PROMPT.local_blocks)
    with pytest.raises(NotFiniteError, match="the model's logits hold NaN"):
        model.generate(PROMPT, options, attention=attention)
    with pytest.raises(NotFiniteError, match="the model's logits hold NaN"):
        model.generate([PROMPT, PROMPT], options, attention=attention)


def test_tokens_that_a_model_rules_out_are_no_defect(make_model: Make) -> None:
    model = BlockModel(tiny_model(LLAMA), plain_tokenizer(), facts=FINE_TUNED, kept_bytes=0)

    def rule_out(module: object, arguments: object, output: Any) -> Any:
        output[..., 7:40] = -torch.inf
        return output

    handle = model.model.lm_head.register_forward_hook(rule_out)
    assert not set(range(7, 40)) & set(model.generate(PROMPT, OPTIONS).token_ids)
    handle.remove()
