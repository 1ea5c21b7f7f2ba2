"""The same laws on a CUDA device. Skipped, with the reason, where there is none."""

from __future__ import annotations

import pytest
import torch
from conftest import FINE_TUNED
from test_exactness import LENGTHS, QUERY, composed_logits, oracle, oracle_greedy, prompt_of
from tiny_models import CASES, tiny_model
from tiny_tokenizers import plain_tokenizer

from blockrag.model.block_model import BlockModel
from blockrag.model.sampling import GenerationOptions
from blockrag.stores import DiskStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(case_id: str, dtype: torch.dtype, **arguments: object) -> BlockModel:
    case = next(case for case in CASES if case.id == case_id)
    return BlockModel(tiny_model(case, dtype).to("cuda"), plain_tokenizer(), facts=FINE_TUNED, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", ["llama", "llama-yarn", "mistral", "gemma3", "cohere", "gpt-oss", "deepseek-v3"])
def test_composed_equals_the_oracle_in_float32(case: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = on_gpu(case, torch.float32, precision="float32")
    prompt = prompt_of(LENGTHS, QUERY)
    expected = oracle(model, prompt)
    for _ in range(2):
        assert (composed_logits(model, prompt) - expected).abs().max() <= 5e-5
    options = GenerationOptions(max_new_tokens=8, ignore_eos=True)
    assert list(model.generate(prompt, options).token_ids) == oracle_greedy(model, prompt, 8)


@pytest.mark.parametrize("case", ["llama", "mistral", "gemma3"])
def test_bfloat16_is_within_its_own_rounding(case: str, tmp_path: object) -> None:
    model = on_gpu(case, torch.bfloat16, store=DiskStore(f"{tmp_path}/kv"))
    assert model.precision == "bfloat16"
    prompt = prompt_of(LENGTHS, QUERY)
    expected = oracle(model, prompt)
    for _ in range(2):
        assert (composed_logits(model, prompt) - expected).abs().max() <= 0.1 * expected.abs().max()
