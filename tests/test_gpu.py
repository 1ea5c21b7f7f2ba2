"""The same laws on a CUDA device, every way blocks get there. Skipped, with the reason, where there is none."""

from __future__ import annotations

import pytest
import torch
from shared_models import FINE_TUNED
from test_exactness import LENGTHS, QUERY, composed_logits, oracle, oracle_greedy, prompt_of
from tiny_models import CASES, tiny_model
from tiny_tokenizers import plain_tokenizer

from blockrag.kernels.at_rest import AtRest, PlacedBlock, payload_of
from blockrag.kernels.device import link_to
from blockrag.kernels.place import Rows
from blockrag.kv import BlockKV, KVLayout, LayerShape
from blockrag.model.block_model import BlockModel
from blockrag.model.device_pool import DevicePool
from blockrag.model.sampling import GenerationOptions
from blockrag.rope import RopeSpec, rotate_
from blockrag.stores import DiskStore, MemoryStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PRECISIONS = ["float32", "bfloat16", "float16", "int8", "int4"]


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on_gpu(case_id: str, dtype: torch.dtype = torch.float32, **arguments: object) -> BlockModel:
    case = next(case for case in CASES if case.id == case_id)
    arguments = {"kept_bytes": 0, "facts": FINE_TUNED, **arguments}
    return BlockModel(tiny_model(case, dtype).to("cuda"), plain_tokenizer(), **arguments)  # type: ignore[arg-type]


def long_prompt():
    """Blocks large enough for several copies and tiles."""
    return prompt_of((300, 17, 256, 1, 120, 300), QUERY)


@pytest.mark.parametrize("source", ["memory", "pinned", "pool", "disk"])
@pytest.mark.parametrize("case", ["llama", "llama-yarn", "mistral", "gemma3", "cohere", "gpt-oss", "deepseek-v3"])
def test_composed_equals_the_oracle_in_float32(case: str, source: str, tmp_path) -> None:
    store = DiskStore(tmp_path / "kv") if source == "disk" else MemoryStore(pinned=source == "pinned")
    pool = DevicePool(64 << 20, "cuda") if source == "pool" else None
    model = on_gpu(case, precision="float32", store=store, device_pool=pool)
    for prompt in (prompt_of(LENGTHS, QUERY), long_prompt()):
        expected = oracle(model, prompt)
        # Computed, then reused.
        for _ in range(3):
            assert (composed_logits(model, prompt) - expected).abs().max() <= 5e-5
    if pool is not None:
        assert pool.stats().hits > 0
    options = GenerationOptions(max_new_tokens=8, ignore_eos=True)
    prompt = prompt_of(LENGTHS, QUERY)
    right = oracle_greedy(model, prompt, 8)
    assert list(model.generate(prompt, options).token_ids) == right
    assert [list(one.token_ids) for one in model.generate([prompt, prompt], options)] == [right, right]


@pytest.mark.parametrize("case", ["llama", "mistral", "gemma3"])
def test_bfloat16_is_within_its_own_rounding(case: str, tmp_path: object) -> None:
    model = on_gpu(case, torch.bfloat16, store=DiskStore(f"{tmp_path}/kv"))
    assert model.precision == "bfloat16"
    prompt = prompt_of(LENGTHS, QUERY)
    expected = oracle(model, prompt)
    for _ in range(2):
        assert (composed_logits(model, prompt) - expected).abs().max() <= 0.1 * expected.abs().max()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_way_to_the_device_gives_the_same(precision: str) -> None:
    """From pageable and pinned memory, by misses and hits of the pool, in order and beside the forward: to the bit."""
    first = on_gpu("llama", precision=precision)
    prompt = long_prompt()
    composed_logits(first, prompt)
    expected = composed_logits(first, prompt)
    pinned = MemoryStore(pinned=True)
    for key, data in first.store.get_many(list(first.store.keys())):
        pinned.put(key, data)
    for store in (first.store, pinned):
        # Room for all of the blocks, for some, for none.
        for nbytes in (64 << 20, first.store.stats().bytes // 2, 256):
            pool = DevicePool(nbytes, "cuda")
            model = on_gpu("llama", precision=precision, store=store, device_pool=pool)
            for _ in range(3):
                assert torch.equal(composed_logits(model, prompt), expected)
            assert (pool.stats().hits > 0) == (nbytes > 256)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_places_what_torch_places_at_a_real_size(precision: str, dtype: torch.dtype) -> None:
    """Heads of 128, windows and a paged cache; `tests/test_triton_place.py` has the small and odd sizes."""
    from blockrag.kernels.triton_place import TritonPlacement
    from blockrag.quantize import quantize

    layout = KVLayout((LayerShape(8, 128, 8, 128),) * 2)
    spec = RopeSpec("half", 0, 128, tuple((500000.0 ** (-torch.arange(0, 128, 2).float() / 128)).tolist()))
    plain = BlockKV(layout, 200, torch.randn(layout.elements_per_token * 200))
    kv = (
        quantize(plain, precision)
        if precision.startswith("int")
        else BlockKV(layout, 200, plain.data.to(getattr(torch, precision)))
    )
    payload = payload_of(kv).cuda()
    slots = torch.randperm(40000, device="cuda")
    for start, paged in ((0, False), (31900, False), (0, True)):
        rows = []
        for index in range(4):
            rope = spec if index % 2 == 0 else RopeSpec()
            if paged:
                page = torch.zeros(40000, 8, 128, dtype=dtype, device="cuda")
                rows.append(Rows(page.transpose(0, 1), 0, rope))
            else:
                rows.append(Rows(torch.zeros(8, 32200 - start, 128, dtype=dtype, device="cuda"), start, rope))
        placement = TritonPlacement(rows, 32200, link_to(torch.device("cuda", 0)), slots if paged else None)
        placement.take([PlacedBlock(AtRest.of(kv), payload.data_ptr(), 31850)])
        placement.launch(range(2))
        first = max(start, 31850)
        for index, made in enumerate(rows):
            states = (kv.keys if index % 2 == 0 else kv.values)(index // 2).cuda().float()
            rotate_(states, made.rope, 31850)
            at = slots[first:32050] if paged else slice(first - start, 32050 - start)
            found = made.states[:, at].float()
            right = states[:, first - 31850 :].to(dtype).float()
            torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_many_requests_at_once_share_a_pool_that_is_too_small() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = on_gpu("llama", precision="float16", device_pool=DevicePool(1 << 18, "cuda"))
    prompts = [prompt_of((300, 200 + 7 * seed, 150), QUERY, seed=seed % 3) for seed in range(6)]
    expected = [composed_logits(model, prompt) for prompt in prompts]
    for _ in range(5):
        with ThreadPoolExecutor(4) as threads:
            for found, right in zip(
                threads.map(lambda one: composed_logits(model, one), prompts), expected, strict=True
            ):
                # Each block is at rest in 16 bits, whoever computed it.
                assert (found - right).abs().max() <= 1e-5
