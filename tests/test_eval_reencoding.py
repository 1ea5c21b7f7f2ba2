"""The ablation without re-encoding, against one forward whose positions begin anew in every passage."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_exactness import LENGTHS, QUERY, TOLERANCE, composed_logits, oracle, prompt_of

from blockrag.attention import additive_mask, block_mask
from blockrag.model.block_model import BlockModel
from blockrag.model.device_pool import DevicePool
from blockrag.model.sampling import GenerationOptions
from blockrag.prompt import SegmentedPrompt

Make = Callable[..., BlockModel]
PROMPT = prompt_of(LENGTHS, QUERY)
# One rotation; interleaved channels; windows and two frequencies; layers without positions; what turns in the values.
FAMILIES = ["llama", "cohere", "gemma3", "smollm3", "deepseek-v3"]


def restarted_logits(model: BlockModel, prompt: SegmentedPrompt) -> torch.Tensor:
    """Logits after the last token of one forward: block mask, positions 0.. in each passage, global in the query."""
    lengths, local = prompt.lengths, [block.local for block in prompt.blocks]
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()[:-1]]
    positions = torch.cat(
        [
            torch.arange(length) + (0 if alone else start)
            for length, alone, start in zip(lengths, local, starts, strict=True)
        ]
    )[None]
    config = model.model.config.get_text_config()
    windows = set(getattr(config, "layer_types", None) or ["full_attention"])
    masks = {
        kind: block_mask(lengths, local, window=config.sliding_window if "sliding" in kind else None)
        for kind in windows
    }
    given = {
        kind: (additive_mask(mask, model.model.dtype) if model.model.config._attn_implementation == "eager" else mask)[
            None, None
        ]
        for kind, mask in masks.items()
    }
    mask = given if len(given) > 1 else next(iter(given.values()))
    with torch.no_grad():
        output = model.model(
            input_ids=torch.tensor([prompt.token_ids]), position_ids=positions, attention_mask=mask, use_cache=False
        )
    return output.logits[0, -1].float()


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_forward_whose_positions_restart(family: str, make_model: Make) -> None:
    model = make_model(family)
    expected = restarted_logits(model, PROMPT)
    assert (oracle(model, PROMPT) - expected).abs().max() > 1e-3, "the ablation changes something"
    for _ in range(2):  # cold, then from the store
        assert (composed_logits(model, PROMPT, reencode=False) - expected).abs().max() <= TOLERANCE


def test_without_compiled_code_as_well(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockrag.kernels.place.library", lambda: None)
    model = make_model("llama")
    assert (composed_logits(model, PROMPT, reencode=False) - restarted_logits(model, PROMPT)).abs().max() <= TOLERANCE


def test_blocks_kept_on_the_device_are_turned_alike(make_model: Make) -> None:
    pytest.importorskip("triton")
    model = make_model("llama", device_pool=DevicePool(1 << 20, "cpu"))
    expected = restarted_logits(model, PROMPT)
    for _ in range(2):  # into the pool, then out of it
        assert (composed_logits(model, PROMPT, reencode=False) - expected).abs().max() <= TOLERANCE


def test_neither_finds_nor_leaves_composed_passages(make_model: Make) -> None:
    model = make_model("llama", kept_bytes=1 << 30)
    expected, ablated = oracle(model, PROMPT), restarted_logits(model, PROMPT)
    for reencode in (True, False, False, True):
        logits = composed_logits(model, PROMPT, reencode=reencode)
        assert (logits - (expected if reencode else ablated)).abs().max() <= TOLERANCE
    stats = model.prompt_memory()
    assert (stats.kept_prompts, stats.hits) == (1, 1)


def test_a_batch_answers_as_each_alone(make_model: Make) -> None:
    model = make_model("llama")
    prompts = [PROMPT, prompt_of((3, 20), 2, seed=1), prompt_of((), 9, seed=2)]
    options = GenerationOptions(max_new_tokens=6, ignore_eos=True)
    together = model.generate(prompts, options, reencode=False)
    alone = [model.generate(prompt, options, reencode=False) for prompt in prompts]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    usual = model.generate(prompts, options)
    assert together[0].token_ids != usual[0].token_ids
    assert together[2].token_ids == usual[2].token_ids, "there is nothing to re-encode"


def test_full_attention_has_nothing_to_re_encode(make_model: Make) -> None:
    model = make_model("llama")
    options = GenerationOptions(max_new_tokens=6, ignore_eos=True)
    ablated = model.generate(PROMPT, options, attention="full", reencode=False)
    assert ablated.token_ids == model.generate(PROMPT, options, attention="full").token_ids
