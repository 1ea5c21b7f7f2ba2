"""Prompts that decode together: every answer is the one the prompt gets alone, whatever stands beside it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exactness import LENGTHS, QUERY, oracle_greedy, prompt_of
from tiny_models import CASES, LONG_CASES, LONGROPE, REFUSED_CASES, VOCAB, WINDOW, ModelCase, tiny_model
from tiny_tokenizers import plain_tokenizer

from blockrag.errors import InputError, PromptTooLongError
from blockrag.model.answer import Generation
from blockrag.model.batch import BatchLimits, group_prompts
from blockrag.model.block_model import BlockModel
from blockrag.model.sampling import GenerationOptions
from blockrag.prompt import Block, SegmentedPrompt
from blockrag.stores import MemoryStore

Make = Callable[..., BlockModel]
TOLERANCE = 1e-5
# Longer than the window and shorter, without passages, with one token only, and one that opens with a global block.
PROMPTS = [
    prompt_of(LENGTHS, QUERY),
    prompt_of((3, 20), 2, seed=1),
    prompt_of((), WINDOW + 5, seed=2),
    prompt_of((4,), 1, seed=3),
    prompt_of((), 1, seed=4),
]
MIXED = SegmentedPrompt((PROMPTS[1].blocks[-1], *PROMPTS[0].blocks, *PROMPTS[1].blocks), stop=())


def options(**values: Any) -> GenerationOptions:
    return GenerationOptions(**{"max_new_tokens": 8, "ignore_eos": True, **values})


def said(generations: Sequence[Generation]) -> list[tuple[int, ...]]:
    return [generation.token_ids for generation in generations]


@contextmanager
def batches(model: BlockModel) -> Iterator[list[torch.Tensor]]:
    """The logits (rows, vocabulary) of every forward of more than one row, those of the probe apart."""
    if model.profile is not None:
        assert isinstance(model._batches_exactly, bool)
    seen: list[torch.Tensor] = []

    def record(module: object, inputs: object, output: Any) -> None:
        if output.logits.shape[0] > 1:
            seen.append(output.logits[:, -1].float().clone())

    handle = model.model.register_forward_hook(record)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.fixture(params=CASES, ids=lambda case: case.id)
def family(request: pytest.FixtureRequest, make_model: Make) -> BlockModel:
    return make_model(request.param.id)


def assert_batch_is_exact(model: BlockModel, prompts: Sequence[SegmentedPrompt], count: int) -> None:
    """One batch, its answers the oracle's, the logits of every step as near to the oracle's as those of one prompt."""
    with batches(model) as seen:
        together = model.generate(prompts, options(max_new_tokens=count))
    assert [len(logits) for logits in seen] == [len(prompts)] * (count - 1), "all of them, in every step"
    # The longest stands first.
    order = sorted(range(len(prompts)), key=lambda index: -prompts[index].num_tokens)
    for row, index in enumerate(order):
        *before, query = prompts[index].blocks
        answer = together[index].token_ids
        longer = Block((*query.token_ids, *answer[:-1]), "", local=False, kind="query")
        expected = model.reference_logits([*before, longer])[-count:]
        assert list(answer) == expected.argmax(-1).tolist()
        actual = torch.stack([logits[row] for logits in seen])
        difference = (actual - expected[1:].float()).abs().max()
        assert difference <= TOLERANCE, f"prompt {index}: {difference:.1e}"


def test_a_batch_is_exact(family: BlockModel) -> None:
    """Different blocks and lengths; windows that end in the padding, before it and behind it."""
    assert_batch_is_exact(family, PROMPTS[:3], 8)
    assert_batch_is_exact(family, [MIXED, PROMPTS[0]], 3)


@pytest.mark.parametrize("name", ["gemma2", "qwen2-sliding", "cohere2"])
def test_a_batch_is_exact_with_soft_caps_and_mixed_layers(make_model: Make, name: str) -> None:
    assert_batch_is_exact(make_model(next(case for case in LONG_CASES if case.id == name)), PROMPTS[:3], 6)


@pytest.mark.long
@pytest.mark.parametrize("case", LONG_CASES, ids=lambda case: case.id)
def test_a_batch_of_more_families_is_exact(make_model: Make, case: ModelCase) -> None:
    assert_batch_is_exact(make_model(case), PROMPTS[:3], 8)


def test_full_attention_in_a_batch_is_exact(family: BlockModel) -> None:
    with batches(family) as seen:
        together = family.generate(PROMPTS[:3], options(), attention="full")
    assert seen
    assert said(together) == said([family.generate(p, options(), attention="full") for p in PROMPTS[:3]])
    assert family.store.stats().blocks == 0


def test_longrope_regimes_never_share_a_batch(make_model: Make) -> None:
    """The model takes its frequencies from the largest position in the batch."""
    model = make_model(ModelCase("phi3-longrope", "phi3", LONGROPE))
    short = [prompt_of((20,), 6), prompt_of((30,), 12, seed=1), prompt_of((40,), 21, seed=2)]
    long = [prompt_of((20, 40), 10), prompt_of((50, 16), 8, seed=3)]
    prompts = [short[0], long[0], short[1], long[1], short[2]]
    with batches(model) as seen:
        together = model.generate(prompts, options(max_new_tokens=12))
    assert {len(logits) for logits in seen} == {2, 3}
    for prompt, generation in zip(prompts, together, strict=True):
        count = min(12, 64 - prompt.num_tokens) if prompt.num_tokens <= 64 else 12
        assert list(generation.token_ids) == oracle_greedy(model, prompt, count)


def test_an_answer_at_the_border_of_its_regime_does_not_push_the_others_over(make_model: Make) -> None:
    """The prompt of 61 tokens may say 3; the others go on while it is still in the batch, or has left it."""
    model = make_model(ModelCase("phi3-longrope", "phi3", LONGROPE))
    prompts = [prompt_of((40,), 21), prompt_of((30,), 5, seed=1), prompt_of((31,), 6, seed=2)]
    together = model.generate(prompts, options(max_new_tokens=20))
    assert [len(generation.token_ids) for generation in together] == [3, 20, 20]
    assert said(together) == said([model.generate(prompt, options(max_new_tokens=20)) for prompt in prompts])


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.lists(st.integers(1, 24), max_size=4), st.integers(1, 12)), min_size=2, max_size=7),
    seed=st.integers(0, 1000),
    ends=st.integers(1, 60),
    batch_size=st.integers(1, 8),
    case=st.sampled_from(["llama-yarn", "mistral", "gemma3", "cohere", "deepseek-v3", "gpt-oss"]),
)
def test_any_batch_answers_as_each_alone(
    lengths: list[tuple[list[int], int]], seed: int, ends: int, batch_size: int, case: str
) -> None:
    """Any lengths; many tokens end an answer, so that rows leave at different steps."""
    from shared_models import FINE_TUNED, shared_model

    model = BlockModel(
        shared_model(case), plain_tokenizer(), precision="float32", store=MemoryStore(), facts=FINE_TUNED
    )
    model.__dict__["stop_ids"] = frozenset(random.Random(seed).sample(range(VOCAB), ends))
    prompts = [prompt_of(local, query, seed=seed + i) for i, (local, query) in enumerate(lengths)]
    chosen = GenerationOptions(max_new_tokens=10)
    alone = [model.generate(prompt, chosen) for prompt in prompts]
    together = model.generate(prompts, chosen, batch_size=batch_size)
    assert said(together) == said(alone)
    assert [(g.text, g.finish_reason) for g in together] == [(g.text, g.finish_reason) for g in alone]


def test_rows_that_ended_leave(make_model: Make) -> None:
    """Half of them, and the buffer shrinks to the others; the last one runs by itself."""
    model = make_model("mistral")
    prompts = [prompt_of((n,), 4, seed=n) for n in (30, 26, 22, 18, 16)]
    answers = [oracle_greedy(model, prompt, 12) for prompt in prompts]
    # Each answer ends with a token that is nobody else's before it: after 2, 4, 12, 7 and 12 tokens.
    ends = {answers[0][1], answers[1][3], answers[3][6]}
    model.__dict__["stop_ids"] = frozenset(ends)
    rows: list[int] = []
    handle = model.model.register_forward_hook(lambda m, i, output: rows.append(output.logits.shape[0]))
    together = model.generate(prompts, GenerationOptions(max_new_tokens=12))
    handle.remove()
    lengths = [next((n for n, t in enumerate(a, 1) if t in ends), 12) for a in answers]
    assert [list(g.token_ids) for g in together] == [a[:n] for a, n in zip(answers, lengths, strict=True)]
    decoding = rows[-(max(lengths) - 1) :]
    assert decoding[0] == 5
    assert decoding == sorted(decoding, reverse=True)
    for step, count in enumerate(decoding, start=1):
        going = sum(n > step for n in lengths)
        assert going <= count < max(2, 2 * going), f"{count} rows for {going} answers in step {step}"


def test_sampling_follows_the_same_seed(make_model: Make) -> None:
    model = make_model("gemma3")
    for values in ({"seed": 7}, {"seed": 7, "top_k": 20, "top_p": 0.9}, {"seed": 1, "repetition_penalty": 1.3}):
        chosen = options(temperature=0.9, **values)
        assert said(model.generate(PROMPTS, chosen)) == said([model.generate(p, chosen) for p in PROMPTS])
    same = model.generate([PROMPTS[0]] * 3, options(temperature=1.0, seed=3))
    assert len(set(said(same))) == 1, "a seed is each answer's own"
    fresh = model.generate([PROMPTS[0]] * 3, options(temperature=5.0))
    assert len(set(said(fresh))) == 3


def test_each_answer_has_its_own_stops_and_text(make_model: Make) -> None:
    model = make_model()
    alone = [model.generate(prompt, options(max_new_tokens=10)) for prompt in PROMPTS[:3]]
    tokenizer = plain_tokenizer()
    stop = tokenizer.decode(list(alone[1].token_ids[3:5]))
    prompts = [PROMPTS[0], SegmentedPrompt(PROMPTS[1].blocks, stop=(stop,)), PROMPTS[2]]
    together = model.generate(prompts, options(max_new_tokens=10))
    expected = [model.generate(prompt, options(max_new_tokens=10)) for prompt in prompts]
    assert [(g.text, g.finish_reason) for g in together] == [(g.text, g.finish_reason) for g in expected]
    assert together[1].finish_reason == "stop"
    assert len(together[1].token_ids) < 10
    assert together[0].finish_reason == "length"


def test_usage_and_timings_are_each_prompts_own(make_model: Make) -> None:
    """A block that was missing counts as computed, once, although it was computed for all of them beforehand."""
    model = make_model()
    shared = SegmentedPrompt((*PROMPTS[0].local_blocks[:2], *PROMPTS[1].blocks), stop=())
    cold = model.generate([PROMPTS[0], shared], options())
    assert [g.usage.blocks_reused for g in cold] == [0, 2]
    assert [g.usage.tokens_reused for g in cold] == [0, sum(LENGTHS[:2])]
    assert [g.usage.prompt_tokens for g in cold] == [PROMPTS[0].num_tokens, shared.num_tokens]
    model.generate(PROMPTS, options())
    for prompt, generation in zip(PROMPTS, model.generate(PROMPTS, options()), strict=True):
        usage, spent = generation.usage, generation.timings
        assert usage.blocks_reused == len(prompt.local_blocks)
        assert usage.prompt_tokens == prompt.num_tokens
        assert usage.tokens_computed == len(prompt.blocks[-1])
        assert usage.new_tokens == 8
        assert 0 < spent.query_prefill_s < spent.ttft_s
        assert spent.decode_s > 0


def test_a_batch_gives_its_memory_back(make_model: Make) -> None:
    model = make_model("mistral")
    model.generate(PROMPTS, options())
    held = model._pool.free_bytes
    assert held > 0
    for _ in range(3):
        model.generate(PROMPTS, options())
        assert model._pool.free_bytes == held


def test_an_error_in_a_batch_frees_its_memory(make_model: Make) -> None:
    model = make_model(ModelCase("llama", "llama"))
    expected = said(model.generate(PROMPTS, options()))
    held = model._pool.free_bytes

    def fail(module: object, inputs: object, output: Any) -> None:
        if output.logits.shape[0] > 1:
            raise RuntimeError("out of memory")

    handle = model.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.generate(PROMPTS, options())
    handle.remove()
    assert model._pool.free_bytes == held
    assert said(model.generate(PROMPTS, options())) == expected


def test_what_the_buffer_held_before_does_not_matter(make_model: Make) -> None:
    """A used buffer may hold anything in what becomes padding; a weight of zero does not undo a NaN."""
    for case in ("mistral", "gpt-oss"):
        model = make_model(case)
        expected = said(model.generate(PROMPTS, options()))
        for idle in model._pool._idle:
            idle.buffer.fill_(255)  # NaN in every floating point format
        assert said(model.generate(PROMPTS, options())) == expected


# -- Which prompts share a batch -------------------------------------------------------------------------------------


def groups_of(
    model: BlockModel, prompts: Sequence[SegmentedPrompt], *, count: int = 99, nbytes: int = 1 << 40
) -> list[list[int]]:
    assert model.profile is not None
    limits = BatchLimits(prompts=count, nbytes=nbytes)
    return group_prompts(prompts, model.profile, 4, dtype=torch.float32, limits=limits)


def bytes_of(model: BlockModel, tokens: int) -> int:
    return model.profile.layout.nbytes(tokens, 4)  # type: ignore[union-attr]


def test_padding_at_most_doubles_the_bytes(make_model: Make) -> None:
    model = make_model()
    lengths = [400, 390, 100, 90, 80, 10, 9, 8, 400, 5]
    prompts = [prompt_of((n - 2,), 2, seed=n) for n in lengths]
    groups = groups_of(model, prompts)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert len(groups) < len(lengths) / 2
    for group in groups:
        longest = max(lengths[index] for index in group)
        assert len(group) * (longest + 4) <= 2 * sum(lengths[index] + 4 for index in group)


def test_bytes_and_count_bound_a_batch(make_model: Make) -> None:
    model = make_model()
    prompts = [prompt_of((20,), 4, seed=n) for n in range(7)]
    assert [len(group) for group in groups_of(model, prompts, count=3)] == [3, 3, 1]
    assert [len(group) for group in groups_of(model, prompts, nbytes=4 * bytes_of(model, 28))] == [4, 3]
    assert [len(group) for group in groups_of(model, prompts, nbytes=0)] == [1] * 7, "too long for any batch"
    with batches(model) as seen:
        expected = said(model.generate(prompts, options(max_new_tokens=4), batch_size=1))
        assert not seen
        assert said(model.generate(prompts, options(max_new_tokens=4), max_batch_bytes=0)) == expected
        assert not seen
        assert said(model.generate(prompts, options(max_new_tokens=4), batch_size=4)) == expected
    assert {len(logits) for logits in seen} == {4, 3}


def test_limits_that_make_no_sense_are_refused(make_model: Make) -> None:
    model = make_model()
    with pytest.raises(InputError, match="batch_size=0"):
        model.generate(PROMPTS, batch_size=0)
    with pytest.raises(InputError, match="max_batch_bytes=-1"):
        model.generate(PROMPTS, max_batch_bytes=-1)


def test_a_prompt_that_is_too_long_is_noticed_before_anything_runs(make_model: Make) -> None:
    model = make_model()
    with pytest.raises(PromptTooLongError, match="the prompt has 2105 tokens"):
        model.generate([*PROMPTS, prompt_of((2100,), 5)], options())
    assert model.store.stats().blocks == 0


def test_a_model_that_ignores_its_mask_answers_one_by_one(make_model: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Noticed before the first batch, by the logits."""
    model = make_model(ModelCase("llama", "llama"))
    plain = model.model.forward
    model.model.forward = lambda *args, attention_mask=None, **kwargs: plain(*args, **kwargs)
    expected = said([model.generate(prompt, options()) for prompt in PROMPTS])
    with batches(model) as seen:
        assert said(model.generate(PROMPTS, options())) == expected
    assert not seen
    assert "does not heed a padding mask" in caplog.text


def test_models_that_cannot_be_composed_answer_one_by_one() -> None:
    model = BlockModel(tiny_model(REFUSED_CASES[0]), plain_tokenizer(), attention="full")
    with batches(model) as seen:
        together = model.generate(PROMPTS[:3], options())
    assert not seen
    assert said(together) == said([model.generate(prompt, options()) for prompt in PROMPTS[:3]])
