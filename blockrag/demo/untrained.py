"""The demo model before it is trained: its tokenizer, and a small Llama with random weights.

Both are functions of their numbers and seeds alone. How the model is trained is `blockrag.finetune.demo`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blockrag.demo import forms
from blockrag.demo.synthetic import RealFact, World

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Shape", "save_untrained", "train_tokenizer"]

# The pieces of GPT-2's tokenizer, but with numbers cut to two digits.
_PIECES = r"""\d\.\d(?!\d)|\d{1,2}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_SPECIAL = ("<pad>", "<bos>", "<eos>")
_MAX_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Shape:
    """The model's numbers.

    Args:
        hidden: Width.
        intermediate: Width of the MLPs.
        layers: Layers.
        heads: Query heads.
        kv_heads: Key/value heads.
        vocabulary: Size of the byte-level BPE vocabulary, before the short numbers are added.
    """

    hidden: int = 192
    intermediate: int = 384
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    vocabulary: int = 768


def train_tokenizer(facts: Sequence[RealFact], vocabulary: int, *, contexts: int = 1500, seed: int = 1000) -> Tokenizer:
    """Train the byte-level BPE tokenizer on made-up countries of the train split, and add the short numbers.

    Args:
        facts: See `World`.
        vocabulary: Tokens to learn.
        contexts: Contexts to learn them from.
        seed: Draws the contexts.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    world = World(facts, split="train", seed=seed)
    texts = []
    for _ in range(contexts):
        context = world.context(passages=4, questions=6)
        texts += [forms.PREFIX] + [forms.passage_block(*passage) for passage in context.passages]
        texts += [forms.query_block(row.question) + forms.answer_text(row.answer) for row in context.questions]
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_numbers(tokenizer)


def save_untrained(out: Path, facts: Sequence[RealFact], shape: Shape, *, seed: int) -> None:
    """Write the untrained model as a directory in Hugging Face's layout, with the demo's template beside it.

    Args:
        out: The directory; made if absent.
        facts: See `World`.
        shape: The model's numbers.
        seed: Draws the weights.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from blockrag.model.facts import BlockAttentionFacts, save_facts

    tokenizer = train_tokenizer(facts, shape.vocabulary)
    pad, bos, eos = range(len(_SPECIAL))
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=_MAX_TOKENS,
            tie_word_embeddings=True,
            pad_token_id=pad,
            bos_token_id=bos,
            eos_token_id=eos,
        )
    )
    model.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=pad, bos_token_id=bos, eos_token_id=eos, max_new_tokens=32
    )
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        model_max_length=_MAX_TOKENS,
    ).save_pretrained(out)
    save_facts(BlockAttentionFacts(block_fine_tuned=False, template=forms.template()), out)


def _with_numbers(tokenizer: Tokenizer) -> Tokenizer:
    """Make one token of every number of two digits ("47", "4.7").

    Copying a number digit by digit is far harder to learn than copying a word: digits repeat all over the passages.
    """
    from tokenizers import Tokenizer

    described = json.loads(tokenizer.to_str())
    vocabulary, merges = described["model"]["vocab"], described["model"]["merges"]
    known = {tuple(merge) for merge in merges}
    pairs = [(first, second) for first in "123456789" for second in "0123456789"]
    pairs += [(first, ".") for first in "123456789"]
    pairs += [(f"{first}.", second) for first in "123456789" for second in "123456789"]
    for pair in pairs:
        if pair not in known:
            vocabulary.setdefault("".join(pair), len(vocabulary))
            merges.append(list(pair))
    return Tokenizer.from_str(json.dumps(described))
