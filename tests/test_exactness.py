"""The exactness laws: every way to a prompt's logits equals one forward under the dense block mask."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tiny_models import CASES, LONG_CASES, LONGROPE, REFUSED_CASES, VOCAB, WINDOW, ModelCase, tiny_model
from tiny_tokenizers import plain_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from blockrag.errors import PromptTooLongError, UnsupportedModelError
from blockrag.model.block_model import BlockModel
from blockrag.model.sampling import GenerationOptions
from blockrag.prompt import Block, SegmentedPrompt
from blockrag.stores import MemoryStore

TOLERANCE = 1e-5
ROUTING_MARGIN = 1e-5
# One block longer than the window, one of a single token.
LENGTHS = (7, WINDOW + 4, 9, 1)
QUERY = 6

Make = Callable[..., BlockModel]


def prompt_of(lengths: Sequence[int], query: int, *, seed: int = 5) -> SegmentedPrompt:
    """A prompt of random tokens: local blocks of these lengths, then a query block."""
    rng = random.Random(seed)
    blocks = [tuple(rng.randrange(3, VOCAB) for _ in range(n)) for n in (*lengths, query)]
    return SegmentedPrompt(
        tuple(
            Block(token_ids=ids, text="", local=i < len(lengths), kind="passage" if i < len(lengths) else "query")
            for i, ids in enumerate(blocks)
        ),
        stop=(),
    )


def composed_logits(model: BlockModel, prompt: SegmentedPrompt, **arguments: Any) -> torch.Tensor:
    """Logits after the prompt's last token, through the production path."""
    running = model.start(**arguments)
    try:
        running.extend(prompt.blocks, room=8)
        assert running.logits is not None
        return running.logits.float()
    finally:
        running.close()


def oracle(model: BlockModel, prompt: SegmentedPrompt) -> torch.Tensor:
    return model.reference_logits(prompt.blocks)[-1].float()


def oracle_greedy(model: BlockModel, prompt: SegmentedPrompt, count: int) -> list[int]:
    """Greedy tokens, each from one more forward under the dense mask."""
    *local, query = prompt.blocks
    tokens: list[int] = []
    for _ in range(count):
        longer = Block(token_ids=(*query.token_ids, *tokens), text="", local=False, kind="query")
        tokens.append(int(model.reference_logits([*local, longer])[-1].argmax()))
    return tokens


def assert_exact(model: BlockModel, prompt: SegmentedPrompt, tolerance: float = TOLERANCE) -> None:
    expected = oracle(model, prompt)
    for _ in range(2):  # cold, then from the store
        difference = (composed_logits(model, prompt) - expected).abs().max()
        assert difference <= tolerance, f"{difference:.1e} on logits of scale {expected.abs().max():.1f}"


@pytest.fixture(params=CASES, ids=lambda case: case.id)
def family(request: pytest.FixtureRequest, make_model: Make) -> BlockModel:
    return make_model(request.param.id)


def test_composed_equals_the_oracle(family: BlockModel) -> None:
    prompt = prompt_of(LENGTHS, QUERY)
    assert_exact(family, prompt)
    # The comparison can fail: full attention over the same tokens is something else.
    full = composed_logits(family, prompt.as_full())
    assert (full - oracle(family, prompt)).abs().max() > 1e-2


def test_greedy_tokens_are_the_oracles(family: BlockModel) -> None:
    prompt = prompt_of(LENGTHS, QUERY)
    options = GenerationOptions(max_new_tokens=12, ignore_eos=True)
    assert list(family.generate(prompt, options).token_ids) == oracle_greedy(family, prompt, 12)


def test_every_order_repeats_and_drops(family: BlockModel) -> None:
    *local, query = prompt_of(LENGTHS, QUERY).blocks
    a, b, c, d = local
    for blocks in ((d, c, b, a), (b, a, b), (c,), (a, a, a), (b, d)):
        assert_exact(family, SegmentedPrompt((*blocks, query), stop=()))


def test_everything_in_the_query_block_is_full_attention(family: BlockModel) -> None:
    prompt = prompt_of(LENGTHS, QUERY)
    for blocks in (prompt.as_full().blocks, prompt_of((), sum(LENGTHS) + QUERY).blocks):
        ids = torch.tensor([[t for block in blocks for t in block.token_ids]])
        expected = family.model(ids).logits[0, -1]
        actual = composed_logits(family, SegmentedPrompt(blocks, stop=()))
        assert (actual - expected).abs().max() <= TOLERANCE


def test_batch_equals_each_alone(family: BlockModel) -> None:
    prompts = [prompt_of(LENGTHS, QUERY), prompt_of((3, 20), 2, seed=1), prompt_of((), 9, seed=2)]
    options = GenerationOptions(max_new_tokens=6, ignore_eos=True)
    together = family.generate(prompts, options)
    for prompt, generation in zip(prompts, together, strict=True):
        assert list(generation.token_ids) == oracle_greedy(family, prompt, 6)
        assert generation.usage.blocks_computed == len(prompt.blocks), "local blocks together beforehand, each once"


def test_conversation_equals_the_oracle(family: BlockModel) -> None:
    """Passages, question, answer, more passages, question: local and global blocks in turn, nothing computed twice."""
    first, second = prompt_of(LENGTHS, QUERY), prompt_of((WINDOW + 3, 5), 4, seed=9)
    running = family.start()
    running.extend(first.blocks, room=4)
    steps = running.answer(GenerationOptions(max_new_tokens=5, ignore_eos=True), ())
    answer = [chunk.token_id for chunk in steps]
    computed_before = running.usage.tokens_computed
    running.extend(second.blocks, room=4)
    said = Block(token_ids=tuple(answer), text="", local=False, kind="turn")
    expected = family.reference_logits([*first.blocks, said, *second.blocks])[-1]
    assert running.logits is not None
    assert (running.logits - expected).abs().max() <= TOLERANCE
    assert running.usage.tokens_computed <= WINDOW + 3 + 5 + 4 < computed_before + WINDOW + 12
    running.close()


def test_through_transformers_generate(family: BlockModel) -> None:
    """The composed cache also works with `model.generate(full ids, past_key_values=cache)`."""
    prompt = prompt_of(LENGTHS, QUERY)
    running = family.start()
    running.extend(prompt.local_blocks, room=20)
    ids = torch.tensor([prompt.token_ids])
    output = family.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=running.cache,
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
    )
    plain = family.generate(prompt, GenerationOptions(max_new_tokens=8, ignore_eos=True))
    assert output[0, len(prompt.token_ids) :].tolist() == list(plain.token_ids)
    running.close()


def test_nothing_before_a_changed_token_changes(family: BlockModel) -> None:
    """Causality: the KV states of a block's first tokens do not depend on its last."""
    ids = prompt_of((WINDOW + 6,), 1).blocks[0].token_ids
    one, other = family.prefill([ids, (*ids[:-1], (ids[-1] + 1) % VOCAB)])
    for layer in range(family.profile.layout.num_layers):  # type: ignore[union-attr]
        for view in ("keys", "values"):
            a, b = getattr(one, view)(layer), getattr(other, view)(layer)
            assert torch.equal(a[:, :-1], b[:, :-1])
    assert not torch.equal(one.data, other.data)


def test_a_request_never_changes_what_the_next_one_gets(family: BlockModel) -> None:
    prompt = prompt_of(LENGTHS, QUERY)
    cold = composed_logits(family, prompt)
    stored = {key: bytes(family.store.get(key) or b"") for key in family.store.keys()}
    family.generate(prompt, GenerationOptions(max_new_tokens=9, ignore_eos=True))
    composed_logits(family, SegmentedPrompt((*prompt.local_blocks[::-1], prompt.blocks[-1]), stop=()))
    assert torch.equal(composed_logits(family, prompt), cold)
    assert {key: bytes(family.store.get(key) or b"") for key in family.store.keys()} == stored


def test_prefill_does_not_depend_on_the_batch(family: BlockModel) -> None:
    blocks = [block.token_ids for block in prompt_of(LENGTHS, QUERY).blocks]
    together = family.prefill(blocks)
    for block, kv in zip(blocks, together, strict=True):
        (alone,) = family.prefill([block])
        assert kv.num_tokens == len(block)
        torch.testing.assert_close(kv.data, alone.data, atol=2e-6, rtol=2e-5)


def routing_margin(model: BlockModel, prompt: SegmentedPrompt) -> float:
    """The least lead of a chosen expert over the best one left out, over all tokens and layers of the oracle."""
    leads = [math.inf]

    def note(_router: Any, _arguments: Any, output: tuple[torch.Tensor, ...]) -> None:
        logits, _, chosen = output
        left_out = torch.ones_like(logits, dtype=torch.bool).scatter(-1, chosen, value=False)
        worst = logits.masked_fill(left_out, math.inf).amin(-1)
        best = logits.masked_fill(~left_out, -math.inf).amax(-1)
        leads.append(float((worst - best).min()))

    routers = [module for module in model.model.modules() if type(module).__name__.endswith("Router")]
    hooks = [router.register_forward_hook(note) for router in routers]
    try:
        oracle(model, prompt)
    finally:
        for hook in hooks:
            hook.remove()
    return min(leads)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), max_size=6),
    query=st.integers(1, 12),
    seed=st.integers(0, 1000),
    case=st.sampled_from(["llama-yarn", "mistral", "gemma3", "cohere", "deepseek-v3", "gpt-oss"]),
)
# Its last token's experts are tied to two steps of float32.
@example(lengths=[6, 21, 9, 12, 11, 24], query=3, seed=549, case="deepseek-v3")
def test_any_prompt_is_exact(lengths: list[int], query: int, seed: int, case: str) -> None:
    from shared_models import FINE_TUNED, shared_model

    model = BlockModel(
        shared_model(case), plain_tokenizer(), precision="float32", store=MemoryStore(), facts=FINE_TUNED
    )
    prompt = prompt_of(lengths, query, seed=seed)
    # A mixture of experts jumps where two experts tie: there the model's own forward depends on the order of its sums.
    assume(routing_margin(model, prompt) > ROUTING_MARGIN)
    assert_exact(model, prompt)


def test_a_tie_of_experts_is_seen() -> None:
    from shared_models import FINE_TUNED, shared_model

    for case, routed in (("deepseek-v3", True), ("gpt-oss", True), ("mistral", False)):
        model = BlockModel(shared_model(case), plain_tokenizer(), precision="float32", facts=FINE_TUNED)
        margins = [routing_margin(model, prompt_of([6, 21, 9, 12, 11, 24], 3, seed=seed)) for seed in (549, 1, 2)]
        assert [math.isfinite(margin) for margin in margins] == [routed] * 3
        assert [margin < ROUTING_MARGIN for margin in margins] == [case == "deepseek-v3", False, False]


@pytest.mark.parametrize("case", ["llama", "mistral", "gemma3", "qwen3"])
def test_bfloat16_is_within_the_models_own_rounding(case: str) -> None:
    """In bfloat16 the composed prompt is no further from float32 than the model's own bfloat16 forward is."""
    from shared_models import FINE_TUNED

    chosen = next(c for c in CASES if c.id == case)
    exact = BlockModel(tiny_model(chosen), plain_tokenizer(), facts=FINE_TUNED, precision="float32")
    rounded = BlockModel(tiny_model(chosen, torch.bfloat16), plain_tokenizer(), facts=FINE_TUNED)
    assert rounded.precision == "bfloat16"
    composed, own = [], []
    for seed in range(8):
        prompt = prompt_of(LENGTHS, QUERY, seed=seed)
        truth = oracle(exact, prompt)
        composed.append((composed_logits(rounded, prompt) - truth).abs().mean())
        own.append((oracle(rounded, prompt) - truth).abs().mean())
    assert torch.stack(composed).mean() <= 1.5 * torch.stack(own).mean()


def test_float16_at_rest_changes_little(make_model: Make) -> None:
    prompt = prompt_of(LENGTHS, QUERY)
    model = make_model("llama", precision="float16")
    assert (composed_logits(model, prompt) - oracle(model, prompt)).abs().max() < 5e-3


def test_longrope_is_exact_in_both_regimes(make_model: Make) -> None:
    case = ModelCase("phi3-longrope", "phi3", LONGROPE)
    model = make_model(case)
    assert model.profile is not None
    assert [regime.name for regime in model.profile.regimes] == ["short", "long"]
    assert_exact(model, prompt_of((20, 20, 10), 6))
    assert_exact(model, prompt_of((20, 20, 30), 6))
    # The same passage in a short and in a long prompt is two different blocks.
    block = prompt_of((20,), 6).blocks[0]
    keys = {model._source.key(block.token_ids, regime) for regime in model.profile.regimes}
    assert len(keys) == 2


def test_longrope_blocks_of_any_length_prefill_together(make_model: Make) -> None:
    """A block past the border must not switch the frequencies of the shorter blocks it is batched with."""
    model = make_model(ModelCase("phi3-longrope", "phi3", LONGROPE))
    prompt = prompt_of((20, 70, 10), 6)
    model.materialize(prompt.local_blocks)
    short = SegmentedPrompt((prompt.blocks[0], prompt.blocks[2], prompt.blocks[3]), stop=())
    assert_exact(model, short)
    assert_exact(model, prompt)
    ids = [block.token_ids for block in prompt.local_blocks]
    for token_ids, kv in zip(ids, model.prefill(ids), strict=True):
        torch.testing.assert_close(kv.data, model.prefill([token_ids])[0].data, atol=2e-6, rtol=2e-5)


def test_longrope_stops_at_the_border_of_its_short_regime(make_model: Make) -> None:
    model = make_model(ModelCase("phi3-longrope", "phi3", LONGROPE))
    generation = model.generate(prompt_of((20, 20), 10), GenerationOptions(max_new_tokens=50, ignore_eos=True))
    assert len(generation.token_ids) == 64 - 50
    assert generation.finish_reason == "length"
    running = model.start()
    running.extend(prompt_of((20,), 10).blocks, room=4)
    with pytest.raises(PromptTooLongError, match="start a new conversation"):
        running.extend(prompt_of((40,), 10).blocks, room=4)
    running.close()


def test_dynamic_ntk_is_refused_beyond_its_limit(make_model: Make) -> None:
    case = next(c for c in LONG_CASES if c.id == "llama-dynamic")
    model = make_model(ModelCase("short-dynamic", case.model_type, {**case.overrides, "max_position_embeddings": 64}))
    assert_exact(model, prompt_of((20, 20), 6))
    with pytest.raises(PromptTooLongError, match="the model can place 64"):
        composed_logits(model, prompt_of((40, 20), 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_deep_model_in_half_precision_is_accepted(dtype: torch.dtype) -> None:
    """Each layer adds its rounding to the keys of those behind it, which is no reason to refuse the model."""
    from shared_models import FINE_TUNED

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=80,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    model = BlockModel(LlamaForCausalLM(config).to(dtype), plain_tokenizer(), facts=FINE_TUNED)
    assert model.profile is not None
    # Half precision is coarse, and still ten times finer than any wrong rotation.
    assert model.profile.shift_error < 0.1
    assert {regime.ropes[-1].keys.kind for regime in model.profile.regimes} == {"half"}


@pytest.mark.parametrize("case", REFUSED_CASES, ids=lambda case: case.id)
def test_families_that_cannot_be_composed_are_refused(case: ModelCase) -> None:
    with pytest.raises(UnsupportedModelError, match='attention="full"'):
        BlockModel(tiny_model(case), plain_tokenizer())


@pytest.mark.long
@pytest.mark.parametrize("case", LONG_CASES, ids=lambda case: case.id)
def test_more_families(case: ModelCase, make_model: Make) -> None:
    model = make_model(case)
    assert_exact(model, prompt_of(LENGTHS, QUERY))
    prompt = prompt_of((WINDOW + 3, 5), 4, seed=3)
    options = GenerationOptions(max_new_tokens=8, ignore_eos=True)
    assert list(model.generate(prompt, options).token_ids) == oracle_greedy(model, prompt, 8)
