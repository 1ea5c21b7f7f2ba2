"""Linear layers through oneDNN: the same numbers, only around our own forwards, and only where they are plain."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from test_exactness import QUERY, oracle, prompt_of
from torch import nn

from blockrag.model import linear as linear_module
from blockrag.model.block_model import BlockModel
from blockrag.model.guard import ForwardGuard
from blockrag.model.linear import FastLinears, onednn_is_faster
from blockrag.model.sampling import GenerationOptions

Make = Callable[..., BlockModel]

needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this build of torch has no oneDNN"
)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch linear layers whatever the processor is."""
    monkeypatch.setattr(linear_module, "onednn_is_faster", lambda: True)


def switched(model: nn.Module) -> int:
    return sum("forward" in vars(module) for module in model.modules())


@needs_onednn
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("rows", [1, 2, 7, 50, 300])
@pytest.mark.parametrize("bias", [False, True])
def test_it_multiplies_as_torch_does(rows: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Sequential(nn.Linear(48, 33, bias=bias))
    states = torch.randn(2, rows, 96, generator=generator)[..., ::2]
    with torch.no_grad():
        right = layer.double()(states.double())
        layer.float()
        with FastLinears(layer):
            assert switched(layer) == 1
            found = layer(states)
    torch.testing.assert_close(found.double(), right, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("everywhere")
def test_what_is_not_plain_stays_as_it_is() -> None:
    class Adapted(nn.Linear):
        pass

    taken = nn.Linear(4, 4)
    taken.forward = lambda states: states  # type: ignore[method-assign]
    model = nn.ModuleList([nn.Linear(4, 4), Adapted(4, 4), taken, nn.Linear(4, 4).to(torch.bfloat16)])
    with FastLinears(model), torch.no_grad():
        assert switched(model) == 3
        assert "forward" not in vars(model[1])
        states = torch.ones(2, 4)
        assert model[2](states) is states
        assert model[3](states.bfloat16()).dtype == torch.bfloat16
        assert model[0](states[:0]).shape == (0, 4)
    assert model[2](states) is states
    # Gradients are torch's business, inside as well.
    with FastLinears(model):
        model[0](torch.ones(2, 4)).sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.usefixtures("everywhere")
def test_layers_are_switched_back_whatever_happens() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    guard = ForwardGuard(model)

    def fail_inside() -> None:
        with guard:
            with guard:
                assert switched(model) == 2
            assert switched(model) == 2, "the inner context leaves what the outer needs"
            raise ValueError("broke")

    with pytest.raises(ValueError, match="broke"):
        fail_inside()
    assert switched(model) == 0
    # And the lock is free for others.
    free: list[bool] = []
    thread = threading.Thread(target=lambda: free.append(guard.exclusive.acquire(timeout=5)))
    thread.start()
    thread.join()
    assert free == [True]


@needs_onednn
@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("case", ["llama", "mistral", "gemma3", "qwen2", "gpt-oss", "deepseek-v3"])
def test_models_are_exact_with_it_and_left_as_they_were(make_model: Make, case: str) -> None:
    model = make_model(case, kept_bytes=0)
    prompt = prompt_of((7, 12, 1), QUERY)
    before = model.model(torch.arange(9)[None]).logits
    running = model.start()
    try:
        running.extend(prompt.blocks, room=4)
        assert running.logits is not None
        assert float((running.logits - oracle(model, prompt)).abs().max()) <= 1e-5
    finally:
        running.close()
    model.generate(prompt, GenerationOptions(max_new_tokens=3))
    assert switched(model.model) == 0
    assert torch.equal(model.model(torch.arange(9)[None]).logits, before)


def test_the_choice_can_be_switched_off_and_is_no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKRAG_CPU_KERNELS", "off")
    assert not onednn_is_faster.__wrapped__()
    monkeypatch.setenv("BLOCKRAG_CPU_KERNELS", "auto")
    for vendor, chosen in (("GenuineIntel", False), ("", False)):
        monkeypatch.setattr(linear_module, "_vendor", lambda vendor=vendor: vendor)
        assert onednn_is_faster.__wrapped__() is chosen
