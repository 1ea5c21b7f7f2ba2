"""Models to measure with: the shapes of real models with random weights, and prompts of random tokens.

How long a forward takes does not depend on what the weights are, so nothing is downloaded. The numbers of each shape
are those of the published configuration it is named after; `tiny-15m` and `100m` are small Llama shapes that a laptop
runs in seconds, `smoke` only shows that a benchmark runs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from blockrag.model.block_model import BlockModel
from blockrag.model.facts import BlockAttentionFacts
from blockrag.prompt import TEMPLATES, Block, SegmentedPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SHAPES", "build_model", "cut", "random_prompt"]

_CONTROL = ("<pad>", "<bos>", "<eos>")


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _llama(**numbers: Any) -> Callable[[], PreTrainedModel]:
    return lambda: LlamaForCausalLM(LlamaConfig(**numbers))


def _qwen3(**numbers: Any) -> Callable[[], PreTrainedModel]:
    return lambda: Qwen3ForCausalLM(Qwen3Config(**numbers))


SHAPES: dict[str, Callable[[], Any]] = {
    "smoke": _llama(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        tie_word_embeddings=True,
    ),
    "tiny-15m": _llama(
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        vocab_size=32000,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
    "100m": _llama(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
    "llama-3.2-1b": _llama(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=131072,
        rope_parameters=_llama3_rope(32.0),
        tie_word_embeddings=True,
    ),
    "qwen3-0.6b": _qwen3(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
    ),
    "llama-3.1-8b": _llama(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        rope_parameters=_llama3_rope(8.0),
        tie_word_embeddings=False,
    ),
}
"""Name to a function that builds the model on torch's default device, in torch's default dtype."""


def build_model(shape: str, *, device: str, seed: int) -> BlockModel:
    """A `BlockModel` of a shape: float32 on a CPU, bfloat16 on a GPU, a byte-level tokenizer without merges.

    Args:
        shape: A name from `SHAPES`.
        device: "cpu" or "cuda".
        seed: Of the random weights.
    """
    torch.manual_seed(seed)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
    try:
        # Built where it is used: eight billion parameters would take minutes to draw on a CPU.
        with torch.device(device):
            model = SHAPES[shape]()
    finally:
        torch.set_default_dtype(previous)
    facts = BlockAttentionFacts(block_fine_tuned=True)
    return BlockModel(model, _byte_tokenizer(), template=TEMPLATES["plain"], facts=facts)


def random_prompt(
    num_tokens: int, *, query_tokens: int, block_tokens: tuple[int, int], vocabulary: int, seed: int
) -> SegmentedPrompt:
    """Passages of random tokens and a query, `num_tokens` tokens together.

    Args:
        num_tokens: Tokens of the whole prompt.
        query_tokens: Tokens of the query block.
        block_tokens: Least and most tokens of a passage; see `cut`.
        vocabulary: Token ids are below this.
        seed: Of the lengths and the tokens.
    """
    generator = random.Random(seed)
    lengths = cut(num_tokens - query_tokens, *block_tokens, generator)
    passages = [_random_block(length, vocabulary, generator, local=True) for length in lengths]
    return SegmentedPrompt(blocks=(*passages, _random_block(query_tokens, vocabulary, generator, local=False)))


def cut(total: int, least: int, most: int, generator: random.Random) -> list[int]:
    """`total` as a sum of random lengths between `least` and `most`; a total below `least` is one length.

    Args:
        total: At least 1.
        least: At least 1.
        most: At least twice `least`, so that every total from `least` on can be cut.
        generator: Where the lengths come from.
    """
    if total < 1 or least < 1 or most < 2 * least:
        raise ValueError(f"cannot cut {total} tokens into blocks of {least} to {most}; most must be 2 x least or more")
    lengths = []
    while total > most:
        # What is left must still make a block.
        lengths.append(generator.randint(least, min(most, total - least)))
        total -= lengths[-1]
    return [*lengths, total]


def _random_block(length: int, vocabulary: int, generator: random.Random, *, local: bool) -> Block:
    token_ids: Sequence[int] = generator.choices(range(len(_CONTROL), vocabulary), k=length)
    return Block(token_ids=tuple(token_ids), text="", local=local, kind="passage" if local else "query")


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Only there because a model has one: the blocks are random tokens, and unknown ids decode to nothing."""
    pieces = [*_CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
