"""Where blocks come from: damage, loss, full stores, namespaces, fingerprints, and what is counted."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exactness import QUERY, composed_logits, oracle, oracle_greedy, prompt_of
from tiny_models import CASES, ModelCase, tiny_model
from tiny_tokenizers import llama3_tokenizer, plain_tokenizer
from transformers import AutoModelForCausalLM

from blockrag import codec
from blockrag.errors import InputError, StoreFullError, UnsafeStoreError
from blockrag.kv import BlockKV
from blockrag.model.block_model import BlockModel
from blockrag.model.facts import BlockAttentionFacts
from blockrag.model.materialize import MaterializeReport
from blockrag.model.prefill import plan_batches
from blockrag.model.sampling import GenerationOptions
from blockrag.model.usage import Usage
from blockrag.prompt import Block, SegmentedPrompt, template_for
from blockrag.stores import MemoryStore
from blockrag.stores.disk import DiskStore

Make = Callable[..., BlockModel]

LENGTHS = (7, 12, 9, 1)
OPTIONS = GenerationOptions(max_new_tokens=6, ignore_eos=True)
FINE_TUNED = BlockAttentionFacts(block_fine_tuned=True)


def usage_of(model: BlockModel, prompt: SegmentedPrompt, **arguments: Any) -> Usage:
    return model.generate(prompt, OPTIONS, **arguments).usage


def with_blocks(prompt: SegmentedPrompt, order: Sequence[int]) -> SegmentedPrompt:
    return SegmentedPrompt((*(prompt.blocks[i] for i in order), prompt.blocks[-1]), stop=())


class CountingStore(MemoryStore):
    """A memory store that notes which keys were read and written, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []
        self.written: list[str] = []

    def get_many(self, keys: Sequence[str]) -> Iterator[tuple[str, memoryview | None]]:
        self.read += keys
        return super().get_many(keys)

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        self.written.append(key)
        super().put(key, data)


# -- Counting --------------------------------------------------------------------------------------------------------


def test_usage_of_cold_warm_reordered_and_partly_warm_prompts(make_model: Make) -> None:
    model = make_model()
    prompt = prompt_of(LENGTHS, QUERY)
    total = sum(LENGTHS)

    cold = usage_of(model, prompt)
    assert (cold.blocks_computed, cold.blocks_reused) == (len(LENGTHS) + 1, 0), "the query block is computed as well"
    assert (cold.tokens_computed, cold.tokens_reused) == (total + QUERY, 0)
    assert (cold.new_tokens, cold.prompt_tokens, cold.blocks_damaged) == (6, total + QUERY, 0)

    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        warm = usage_of(model, with_blocks(prompt, order))
        assert (warm.blocks_computed, warm.tokens_computed) == (1, QUERY)
        assert (warm.blocks_reused, warm.tokens_reused) == (len(LENGTHS), total)
        assert warm.prompt_tokens == total + QUERY

    other = prompt_of((4, 5), QUERY, seed=77)
    mixed = SegmentedPrompt((prompt.blocks[1], *other.blocks[:2], prompt.blocks[0], prompt.blocks[-1]), stop=())
    partly = usage_of(model, mixed)
    assert (partly.blocks_reused, partly.tokens_reused) == (2, 12 + 7)
    assert (partly.blocks_computed, partly.tokens_computed) == (3, 4 + 5 + QUERY)

    full = usage_of(model, prompt, attention="full")
    assert (full.blocks_computed, full.blocks_reused, full.tokens_computed) == (1, 0, total + QUERY)


def test_timings_cover_the_steps_that_ran(make_model: Make) -> None:
    model = make_model()
    prompt = prompt_of(LENGTHS, QUERY)
    cold = model.generate(prompt, OPTIONS).timings
    warm = model.generate(prompt, OPTIONS).timings
    for timings in (cold, warm):
        parts = timings.load_s + timings.compose_s + timings.block_prefill_s + timings.query_prefill_s
        assert timings.query_prefill_s > 0
        assert timings.compose_s > 0
        assert timings.decode_s > 0
        assert parts <= timings.ttft_s
    assert cold.block_prefill_s > 0
    assert warm.load_s > 0
    assert model.generate(prompt_of((), 5), OPTIONS).timings.load_s == 0


def test_a_repeated_block_is_read_and_written_once(make_model: Make) -> None:
    store = CountingStore()
    model = make_model(store=store)
    prompt = with_blocks(prompt_of(LENGTHS, QUERY), (0, 1, 0, 0))
    cold = usage_of(model, prompt)
    assert len(store.written) == len(store.read) == 2
    assert (cold.blocks_computed, cold.tokens_computed) == (5, 3 * 7 + 12 + QUERY)
    store.read.clear()
    warm = usage_of(model, prompt)
    assert len(store.read) == 2
    assert (warm.blocks_reused, warm.tokens_reused) == (4, 3 * 7 + 12)
    assert len(store.written) == 2


def test_nothing_is_read_for_a_prompt_without_local_blocks(make_model: Make) -> None:
    store = CountingStore()
    usage_of(make_model(store=store), prompt_of((), 7))
    assert store.read == store.written == []


# -- Damage and loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["magic", "header", "payload", "truncated", "empty", "other-block"])
def test_a_damaged_block_is_recomputed_and_replaced(
    make_model: Make, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = MemoryStore()
    model = make_model(store=store)
    prompt = prompt_of(LENGTHS, QUERY)
    expected = composed_logits(model, prompt)
    key, other = (model.block_key(block.token_ids) for block in prompt.blocks[1:3])
    good = bytes(store.get(key) or b"")
    bad = bytearray(good)
    if place == "other-block":
        bad = bytearray(store.get(other) or b"")
    elif place in ("truncated", "empty"):
        bad = bad[: len(bad) // 2] if place == "truncated" else bytearray()
    else:
        bad[{"magic": 3, "header": 40, "payload": len(bad) - 5}[place]] ^= 0x10
    store.put(key, bad)

    with caplog.at_level(logging.WARNING, logger="blockrag"):
        usage = usage_of(model, prompt)
    assert usage.blocks_damaged == 1
    assert (usage.blocks_computed, usage.blocks_reused) == (2, len(LENGTHS) - 1)
    assert key[:12] in caplog.text
    header = codec.read_header(store.get(key) or b"")
    assert (header.key, header.num_tokens) == (key, len(prompt.blocks[1])), "the damaged copy was replaced"
    assert len(store.get(key) or b"") == len(good)
    assert (composed_logits(model, prompt) - expected).abs().max() <= 1e-5
    assert usage_of(model, prompt).blocks_damaged == 0


@settings(max_examples=20, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_the_answer_never_shows_a_flipped_bit(where: float, bit: int) -> None:
    from shared_models import shared_model

    store = MemoryStore()
    model = BlockModel(shared_model("llama"), plain_tokenizer(), store=store, facts=FINE_TUNED, kept_bytes=0)
    prompt = prompt_of((5, 6), QUERY)
    expected = model.generate(prompt, OPTIONS)
    data = bytearray(store.get(model.block_key(prompt.blocks[0].token_ids)) or b"")
    data[int(where * len(data))] ^= 1 << bit
    store.put(model.block_key(prompt.blocks[0].token_ids), data)
    again = model.generate(prompt, OPTIONS)
    assert (again.token_ids, again.usage.blocks_damaged) == (expected.token_ids, 1)


def test_a_store_that_is_full_still_answers(make_model: Make, caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore(max_bytes=100)
    model = make_model(store=store)
    prompt = prompt_of(LENGTHS, QUERY)
    expected = oracle_greedy(model, prompt, 6)
    with caplog.at_level(logging.WARNING, logger="blockrag"):
        for _ in range(2):
            generation = model.generate(prompt, OPTIONS)
            assert list(generation.token_ids) == expected
            assert generation.usage.blocks_reused == 0
    assert "was computed but not stored" in caplog.text
    together = model.generate([prompt, prompt_of((3,), 4, seed=2)], OPTIONS)
    assert list(together[0].token_ids) == expected, "a batch answers as well"
    assert len(list(store.keys())) == 0


def test_materialize_says_when_the_store_is_full(make_model: Make) -> None:
    """There the store is the purpose: not storing is an error."""
    model = make_model(store=MemoryStore(max_bytes=100))
    with pytest.raises(StoreFullError, match="max_bytes"):
        model.materialize(prompt_of(LENGTHS, QUERY).local_blocks)


def test_a_store_with_room_for_some_blocks_answers_and_evicts(make_model: Make) -> None:
    model = make_model()
    prompt = prompt_of((9, 9, 9, 9), QUERY)
    expected = composed_logits(model, prompt)
    one = len(model.store.get(model.block_key(prompt.blocks[0].token_ids)) or b"")
    small = MemoryStore(max_bytes=2 * one)
    for _ in range(3):
        # Another batch may round the recomputed blocks otherwise.
        assert (composed_logits(model, prompt, store=small) - expected).abs().max() <= 1e-5
        assert small.stats().blocks == 2


def test_a_store_may_lose_blocks_between_calls(make_model: Make) -> None:
    model = make_model()
    prompt = prompt_of(LENGTHS, QUERY)
    expected = composed_logits(model, prompt)
    model.store.delete_many([model.block_key(prompt.blocks[i].token_ids) for i in (0, 2)])
    usage = usage_of(model, prompt)
    assert (usage.blocks_reused, usage.blocks_computed, usage.blocks_damaged) == (2, 3, 0)
    # Another batch may round the recomputed blocks otherwise.
    assert (composed_logits(model, prompt) - expected).abs().max() <= 1e-5


class ForgetfulStore(MemoryStore):
    """Says it holds a block, then does not give it."""

    def get(self, key: str) -> memoryview | None:
        return None


def test_a_block_lost_after_materializing_is_computed_again(make_model: Make) -> None:
    model = make_model(store=ForgetfulStore())
    prompts = [prompt_of(LENGTHS, QUERY), prompt_of((4,), 3, seed=8)]
    for prompt, generation in zip(prompts, model.generate(prompts, OPTIONS), strict=True):
        assert list(generation.token_ids) == oracle_greedy(model, prompt, 6)
        assert generation.usage.blocks_reused == 0


class TamperedStore(MemoryStore):
    """A store that finds something blockrag never wrote."""

    def get_many(self, keys: Sequence[str]) -> Iterator[tuple[str, memoryview | None]]:
        raise UnsafeStoreError("a pickled row")


def test_an_unsafe_store_is_an_error_that_frees_the_cache(make_model: Make) -> None:
    model = make_model()
    prompt = prompt_of(LENGTHS, QUERY)
    model.generate(prompt, OPTIONS)
    held = model._pool.free_bytes
    assert held > 0
    for _ in range(3):
        with pytest.raises(UnsafeStoreError, match="pickled"):
            model.generate(prompt, OPTIONS, store=TamperedStore())
        assert model._pool.free_bytes == held


# -- Materialize and prefill -----------------------------------------------------------------------------------------


def test_materialize_reports_and_calls_back(make_model: Make) -> None:
    model = make_model()
    a, b, c, d = prompt_of(LENGTHS, QUERY).local_blocks
    seen: list[tuple[Block, bool, int]] = []

    def note(block: Block, stored: bool, nbytes: int) -> None:
        seen.append((block, stored, nbytes))

    first = model.materialize([a, b, a], on_block=note)
    sizes = {block: len(model.store.get(model.block_key(block.token_ids)) or b"") for block in (a, b)}
    assert first == MaterializeReport(
        blocks_new=2, blocks_reused=0, tokens_new=19, tokens_reused=0, bytes_new=sum(sizes.values())
    )
    assert {block: (stored, n) for block, stored, n in seen} == {a: (False, sizes[a]), b: (False, sizes[b])}
    seen.clear()

    second = model.materialize([d, c, b, a], on_block=note)
    assert (second.blocks_new, second.blocks_reused) == (2, 2)
    assert (second.tokens_new, second.tokens_reused) == (9 + 1, 7 + 12)
    assert second.bytes_new == sum(n for _, _, n in seen)
    assert [(block, stored) for block, stored, _ in seen][:2] == [(b, True), (a, True)], "stored ones in their order"
    assert {block for block, stored, _ in seen if not stored} == {c, d}

    assert model.materialize([a, b, c, d]) == MaterializeReport(0, 4, 0, 29, 0)
    assert model.materialize([]) == MaterializeReport(0, 0, 0, 0, 0)
    usage = usage_of(model, prompt_of(LENGTHS, QUERY))
    assert (usage.blocks_reused, usage.blocks_computed) == (4, 1)


def test_materialize_into_another_store(make_model: Make) -> None:
    model, other = make_model(), MemoryStore()
    model.materialize(prompt_of(LENGTHS, QUERY).local_blocks, other)
    assert (model.store.stats().blocks, other.stats().blocks) == (0, 4)


def test_prefill_stores_nothing_and_refuses_empty_blocks(make_model: Make) -> None:
    model = make_model()
    (kv,) = model.prefill([[5, 6, 7]])
    assert isinstance(kv, BlockKV)
    assert kv.num_tokens == 3
    assert model.prefill([]) == []
    assert model.store.stats().blocks == 0
    with pytest.raises(InputError, match="block 1 has no tokens; drop it"):
        model.prefill([[5], [], [6]])


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=30), budget=st.integers(1, 200))
def test_batches_hold_every_block_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = plan_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


def test_a_computed_block_is_what_the_store_gives_back(make_model: Make) -> None:
    """Precision at rest applies at once: the request that computes a block sees what every later one sees."""
    model = make_model(precision="bfloat16")
    prompt = prompt_of(LENGTHS, QUERY)
    cold = composed_logits(model, prompt)
    assert torch.equal(composed_logits(model, prompt), cold)
    assert (cold - oracle(model, prompt)).abs().max() > 1e-4, "and it is rounded"


def test_out_of_float16s_range_is_kept_as_float32() -> None:
    torch.manual_seed(0)
    llama = tiny_model(ModelCase("llama", "llama"))
    with torch.no_grad():
        llama.base_model.layers[1].self_attn.v_proj.weight.mul_(2e5)
        llama.base_model.layers[1].self_attn.o_proj.weight.div_(2e5)
    model = BlockModel(llama, plain_tokenizer(), facts=FINE_TUNED, store=MemoryStore())
    assert model.precision == "float16"
    prompt = prompt_of(LENGTHS, QUERY)
    for _ in range(2):
        assert (composed_logits(model, prompt) - oracle(model, prompt)).abs().max() < 1e-2
    headers = [codec.read_header(model.store.get(key) or b"") for key in model.store.keys()]
    assert {header.precision for header in headers} == {"float32"}
    assert usage_of(model, prompt).blocks_damaged == 0


def test_states_that_are_not_finite_are_an_error() -> None:
    llama = tiny_model(ModelCase("llama", "llama"))
    model = BlockModel(llama, plain_tokenizer(), facts=FINE_TUNED, store=MemoryStore())
    with torch.no_grad():
        llama.base_model.layers[2].self_attn.v_proj.weight[0, 0] = float("inf")
    with pytest.raises(InputError, match=r"layer 2.*NaN or infinity"):
        model.generate(prompt_of(LENGTHS, QUERY), OPTIONS)
    assert model.store.stats().blocks == 0


# -- Who shares blocks with whom -------------------------------------------------------------------------------------


def test_namespaces_do_not_share_blocks(make_model: Make) -> None:
    store = MemoryStore()
    prompt = prompt_of(LENGTHS, QUERY)
    for namespace in ("", "a", "b", "ä"):
        model = make_model(store=store, namespace=namespace)
        assert usage_of(model, prompt).blocks_reused == 0, namespace
        assert usage_of(make_model(store=store, namespace=namespace), prompt).blocks_reused == 4
    assert store.stats().blocks == 4 * 4


def test_two_models_on_one_store_never_get_each_others_blocks(make_model: Make) -> None:
    store = MemoryStore()
    prompt = prompt_of(LENGTHS, QUERY)
    cases = ("llama", "llama-linear", "llama-yarn", "mistral", "qwen2", "qwen3")
    logits: dict[str, torch.Tensor] = {}
    for case in cases:
        model = make_model(case, store=store)
        assert usage_of(model, prompt).blocks_reused == 0, case
        logits[case] = composed_logits(model, prompt)
        assert (logits[case] - oracle(model, prompt)).abs().max() < 1e-5
    for case in cases:
        model = make_model(case, store=store)
        assert usage_of(model, prompt).blocks_reused == 4
        assert torch.equal(composed_logits(model, prompt), logits[case])
    assert store.stats().blocks == 4 * len(cases)


def fresh(**arguments: Any) -> BlockModel:
    arguments.setdefault("facts", FINE_TUNED)
    return BlockModel(tiny_model(CASES[0]), arguments.pop("tokenizer", plain_tokenizer()), **arguments)


def test_the_same_model_has_the_same_fingerprint(tmp_path: Path) -> None:
    model = fresh()
    expected = model.fingerprint
    assert fresh().fingerprint == expected
    for name in ("one", "other"):
        model.model.save_pretrained(tmp_path / name)
        model.tokenizer.save_pretrained(tmp_path / name)
    loaded = [
        BlockModel.from_pretrained(tmp_path / name, block_fine_tuned=True, device="cpu") for name in ("one", "other")
    ]
    # Even after use, and whatever the attention it was loaded with.
    usage_of(loaded[0], prompt_of(LENGTHS, QUERY))
    eager = AutoModelForCausalLM.from_pretrained(tmp_path / "one", attn_implementation="eager")
    loaded.append(BlockModel(eager, loaded[0].tokenizer, facts=FINE_TUNED))
    for other in loaded:
        assert expected.differences(other.fingerprint) == ()
        assert other.fingerprint.digest == expected.digest


def change_weight(model: BlockModel) -> BlockModel:
    other = copy.deepcopy(model.model)
    with torch.no_grad():
        other.base_model.layers[3].mlp.down_proj.weight[0, 0] += 1e-6
    return BlockModel(other, model.tokenizer, facts=FINE_TUNED)


def change_config(model: BlockModel) -> BlockModel:
    other = copy.deepcopy(model.model)
    other.config.rms_norm_eps *= 2
    return BlockModel(other, model.tokenizer, facts=FINE_TUNED)


def change_rope(model: BlockModel) -> BlockModel:
    return BlockModel(tiny_model(CASES[1]), model.tokenizer, facts=FINE_TUNED)


def change_tokenizer(model: BlockModel) -> BlockModel:
    tokenizer = plain_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    return BlockModel(model.model, tokenizer, facts=FINE_TUNED, template=model.template)


def change_template(model: BlockModel) -> BlockModel:
    template = template_for(llama3_tokenizer())
    return BlockModel(model.model, model.tokenizer, facts=FINE_TUNED, template=template)


def change_dtype(model: BlockModel) -> BlockModel:
    other = copy.deepcopy(model.model).bfloat16()
    return BlockModel(other, model.tokenizer, facts=FINE_TUNED, precision=model.precision)


def change_precision(model: BlockModel) -> BlockModel:
    return BlockModel(model.model, model.tokenizer, facts=FINE_TUNED, precision="bfloat16")


@pytest.mark.parametrize(
    ("change", "factors"),
    [
        (change_weight, {"weights"}),
        (change_config, {"config"}),
        (change_rope, {"rope"}),
        (change_tokenizer, {"tokenizer"}),
        (change_template, {"template"}),
        (change_dtype, {"weights", "compute_dtype", "rope"}),  # the frequencies are buffers and were rounded as well
        (change_precision, {"precision"}),
    ],
)
def test_whatever_shapes_the_states_changes_the_fingerprint(
    change: Callable[[BlockModel], BlockModel], factors: set[str]
) -> None:
    store = MemoryStore()
    model = fresh(store=store)
    prompt = prompt_of(LENGTHS, QUERY)
    usage_of(model, prompt)
    other = change(model)
    assert set(model.fingerprint.differences(other.fingerprint)) == factors
    assert model.fingerprint.digest != other.fingerprint.digest
    assert usage_of(other, prompt, store=store).blocks_reused == 0


def test_a_store_on_disk_serves_another_process_of_the_same_model(make_model: Make, tmp_path: Path) -> None:
    """A second model object on a second handle finds, to the bit, what the first one stored."""
    prompt = prompt_of(LENGTHS, QUERY)
    first, second = DiskStore(tmp_path / "kv"), None
    try:
        expected = composed_logits(make_model(store=first), prompt)
        second = DiskStore(tmp_path / "kv")
        model = make_model(store=second)
        assert torch.equal(composed_logits(model, prompt), expected)
        assert usage_of(model, prompt).blocks_reused == 4
    finally:
        first.close()
        if second is not None:
            second.close()


@pytest.mark.parametrize("precision", ["int16", "FLOAT16", "fp16"])
def test_an_unknown_precision_is_refused(make_model: Make, precision: str) -> None:
    with pytest.raises(InputError, match=rf"precision='{precision}' is not one of 'float32'"):
        make_model(precision=precision)
