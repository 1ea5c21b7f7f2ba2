"""Muon with AdamW behind one interface: who optimizes what, schedules, and going on from a saved state."""

from __future__ import annotations

import copy

import torch
from tiny_models import ModelCase, tiny_model
from torch import nn

from blockrag.finetune.muon import MuonWithAdamW


def tiny_llama() -> nn.Module:
    return tiny_model(ModelCase("llama", "llama")).train()


def optimizer(model: nn.Module) -> MuonWithAdamW:
    return MuonWithAdamW(model, lr=1e-2, betas=(0.9, 0.98), weight_decay=0.1)


def step(model: nn.Module, chosen: torch.optim.Optimizer) -> None:
    ids = torch.arange(24).view(2, 12) % 32 + 1
    chosen.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    chosen.step()


def test_every_weight_is_in_exactly_one_part_and_only_matrices_of_layers_go_to_muon() -> None:
    model = tiny_llama()
    chosen = optimizer(model)
    muon, adamw = chosen._parts
    names = {id(weight): name for name, weight in model.named_parameters()}
    of_muon = {names[id(w)] for group in muon.param_groups for w in group["params"]}
    of_adamw = {names[id(w)] for group in adamw.param_groups for w in group["params"]}
    assert of_muon | of_adamw == set(names.values())
    assert not of_muon & of_adamw
    assert all(name.startswith("model.layers.") and "norm" not in name for name in of_muon)
    assert any("embed" in name for name in of_adamw)
    assert any("norm" in name for name in of_adamw)
    decays = {names[id(w)]: group["weight_decay"] for group in adamw.param_groups for w in group["params"]}
    assert {name for name, decay in decays.items() if decay == 0} == {name for name in of_adamw if "norm" in name}


def test_a_schedule_reaches_both_parts_also_behind_a_saved_state() -> None:
    model = tiny_llama()
    chosen = optimizer(model)
    chosen.load_state_dict(copy.deepcopy(chosen.state_dict()))
    schedule = torch.optim.lr_scheduler.LambdaLR(chosen, lambda _: 0.0)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    step(model, chosen)
    schedule.step()
    assert {group["lr"] for part in chosen._parts for group in part.param_groups} == {0.0}
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_going_on_from_a_saved_state_gives_the_same_weights() -> None:
    model = tiny_llama()
    chosen = optimizer(model)
    step(model, chosen)
    other = tiny_llama()
    other.load_state_dict(model.state_dict())
    resumed = optimizer(other)
    resumed.load_state_dict(copy.deepcopy(chosen.state_dict()))
    for _ in range(2):
        step(model, chosen)
        step(other, resumed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    fresh = tiny_llama()
    assert not torch.equal(fresh.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
