"""Whole prompts composed as a GPU does it: equal to one forward under the block mask, from the pool and across the bus.

Without a CUDA device the kernel is interpreted and copies are over at once; tests/test_gpu.py has the same laws there.
"""

from __future__ import annotations

import pytest
import torch
from test_exactness import LENGTHS, QUERY, composed_logits, oracle, oracle_greedy, prompt_of

from blockrag.kernels.device import Link
from blockrag.model.device_pool import DevicePool
from blockrag.model.sampling import GenerationOptions

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel is compiled here")


class PinnedLink(Link):
    """Host memory as a device sees pinned memory: copies come in the order of the layers."""

    def is_pinned(self, memory: torch.Tensor) -> bool:
        return True


def pool_of(nbytes: int, pinned: bool = False) -> DevicePool:
    pool = DevicePool(nbytes, "cpu")
    if pinned:
        pool.link = PinnedLink(torch.device("cpu"))
    return pool


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("case", ["llama", "gemma3", "cohere", "deepseek-v3"])
def test_composed_equals_the_oracle(make_model, case, pinned):
    pool = pool_of(4 << 20, pinned)
    model = make_model(case, device_pool=pool, kept_bytes=0)
    prompt = prompt_of(LENGTHS, QUERY)
    expected = oracle(model, prompt)
    # Computed, then found in the pool.
    for _ in range(2):
        assert (composed_logits(model, prompt) - expected).abs().max() <= 1e-5
    assert pool.stats().hits == len(set(prompt.local_blocks))


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_each_precision_gives_what_the_cpu_gives(make_model, precision):
    prompt = prompt_of(LENGTHS, QUERY)
    plain = make_model("llama", precision=precision, kept_bytes=0)
    expected = composed_logits(plain, prompt)
    for nbytes in (1 << 20, 256):
        model = make_model("llama", precision=precision, kept_bytes=0, store=plain.store, device_pool=pool_of(nbytes))
        assert (composed_logits(model, prompt) - expected).abs().max() <= 1e-5


def test_answers_are_the_oracles(make_model):
    model = make_model("llama", device_pool=pool_of(1 << 20, pinned=True))
    prompt = prompt_of(LENGTHS, QUERY)
    options = GenerationOptions(max_new_tokens=6, ignore_eos=True)
    right = oracle_greedy(model, prompt, 6)
    assert list(model.generate(prompt, options).token_ids) == right
    # The second one finds the passages composed.
    assert list(model.generate(prompt, options).token_ids) == right
    # Rows of a batch are written before the batch runs.
    assert [list(one.token_ids) for one in model.generate([prompt, prompt], options)] == [right, right]
    model.forget_kept()
    assert model.device_pool.stats().blocks == 0
