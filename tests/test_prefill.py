"""Computing blocks: forwards that end early, how blocks are put together in batches, and what is stored of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_exactness import composed_logits, oracle, prompt_of
from tiny_models import CASES, LONG_CASES, VOCAB, ModelCase, tiny_model
from tiny_tokenizers import plain_tokenizer
from transformers.models.llama.modeling_llama import LlamaAttention

from blockrag.model.block_model import BlockModel
from blockrag.model.capture import capture
from blockrag.model.facts import BlockAttentionFacts
from blockrag.model.profile import structure_of
from blockrag.model.verification import verified_profile

FINE_TUNED = BlockAttentionFacts(block_fine_tuned=True)

# -- Ending the forward early ----------------------------------------------------------------------------------------


def some_ids(rows: int = 3, tokens: int = 21) -> torch.Tensor:
    """Random tokens, more of them than the windows of the models here see."""
    return torch.randint(0, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(3))


def captured(model: Any, *, early: bool) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    taken: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def take(place: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        taken[place] = keys, values

    capture(model, structure_of(model), some_ids(), 5, take, early=early)
    return taken


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=some_ids()).logits
    return logits


@pytest.mark.parametrize("case", [*CASES, *LONG_CASES], ids=lambda case: case.id)
def test_a_forward_that_ends_early_gives_the_same_states_and_leaves_no_trace(case: ModelCase) -> None:
    model = tiny_model(case)
    model.set_attn_implementation("eager")
    structure = structure_of(model)
    modules = dict(model.named_modules())
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules.values()]
    config, logits = model.config.to_dict(), logits_of(model)

    whole, early = (captured(model, early=early) for early in (False, True))
    assert len(whole) == len(early) == len(structure.indices)
    for place, states in whole.items():
        assert all(map(torch.equal, early[place], states)), f"layer {place}"

    assert torch.equal(logits_of(model), logits), "the next forward is a whole one"
    assert model.config.to_dict() == config
    assert dict(model.named_modules()) == modules
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules.values()] == hooks


def test_nothing_runs_behind_the_last_states() -> None:
    model = tiny_model(CASES[0])
    ran: list[str] = []

    def note(name: str) -> Any:
        return lambda *_: ran.append(name)

    for name in ("layers.2.mlp", "layers.3.self_attn.v_proj", "layers.3.self_attn.o_proj", "layers.3.mlp", "norm"):
        model.base_model.get_submodule(name).register_forward_hook(note(name))
    captured(model, early=True)
    assert ran == ["layers.2.mlp", "layers.3.self_attn.v_proj"]
    ran.clear()
    captured(model, early=False)
    assert len(ran) == 5


def test_asking_for_hidden_states_later_still_works() -> None:
    """transformers installs its recorders when they are first asked for, and an ended forward is no obstacle."""
    model = tiny_model(CASES[0])
    expected = tiny_model(CASES[0])(input_ids=some_ids(), output_hidden_states=True).hidden_states
    captured(model, early=True)
    assert all(map(torch.equal, model(input_ids=some_ids(), output_hidden_states=True).hidden_states, expected))
    model.config.output_hidden_states = True
    captured(model, early=True)
    assert all(map(torch.equal, model(input_ids=some_ids()).hidden_states, expected)), "none kept from before"


def test_every_model_here_may_end_early() -> None:
    assert all(verified_profile(tiny_model(case)).captures_early for case in (CASES[0], CASES[7], CASES[-1]))


class TwiceAttention(LlamaAttention):
    """Hands zeros over before it hands its states over."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None and past_key_values.get_seq_length(self.layer_idx) == 0:
            zeros = hidden_states.new_zeros(hidden_states.shape[0], 2, hidden_states.shape[1], self.head_dim)
            past_key_values.update(zeros, zeros, self.layer_idx)
        return super().forward(hidden_states, *args, past_key_values=past_key_values, **kwargs)


def test_a_model_whose_states_come_later_gets_whole_forwards() -> None:
    """Its early states are wrong; it is composed exactly all the same."""
    llama = tiny_model(CASES[0])
    for layer in llama.base_model.layers:
        layer.self_attn.__class__ = TwiceAttention
    model = BlockModel(llama, plain_tokenizer(), facts=FINE_TUNED, precision="float32")
    assert model.profile is not None
    assert not model.profile.captures_early
    prompt = prompt_of((7, 12, 1), 4)
    assert (composed_logits(model, prompt) - oracle(model, prompt)).abs().max() <= 1e-5
