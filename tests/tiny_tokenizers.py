"""Small byte-level BPE tokenizers, trained in memory, for every test that needs token ids. No downloads.

They behave like their large namesakes where it matters: the same control tokens, the same chat markup, every byte
can be encoded, and the same call always gives the same ids. Each call returns a fresh object, so a test may change it.

    llama3_tokenizer()  Llama 3 headers; a BOS token; a chat template that strips content
    chatml_tokenizer()  Qwen form; no BOS token; `<think>` and `</think>` are added tokens that are not special
    plain_tokenizer()   <pad>, <bos>, <eos>; no chat template
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "You are an intelligent AI assistant. Please answer questions based on the user's instructions.",
    "Below are some reference documents that may help you in answering the user's question.",
    "Please write a high-quality answer for the given question using only the provided search documents "
    "(some of which might be irrelevant).\nQuestion: who wrote the book?\nAnswer: the author wrote it in 1843.",
    "Answer the question using the documents.\nTitle: The river\nThe river runs from the lake to the sea.\n",
    "- Title: Ada Lovelace\nAda Lovelace was an English mathematician and writer.\n",
    "- Title: Analytical Engine\nThe Analytical Engine was a proposed mechanical computer.\n",
    "The system, the user and the assistant each take a turn; the turn of the user ends with a question.",
)

LLAMA3_CONTROL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)
LLAMA3_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML_ADDED = ("<think>", "</think>")
CHATML_CHAT = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN_CONTROL = ("<pad>", "<bos>", "<eos>")


@cache
def _trained(control: tuple[str, ...], vocab_size: int) -> str:
    """The trained backend as JSON: the special tokens come first, then the 256 bytes, then the merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(control),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


def byte_level_tokenizer(control: Sequence[str], *, vocab_size: int = 512, **special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose first ids are `control`; `special` names bos_token, eos_token, pad_token."""
    backend = Tokenizer.from_str(_trained(tuple(control), vocab_size))
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)


def llama3_tokenizer(*, vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Llama 3 markup, with its BOS token and a chat template that strips each message."""
    tokenizer = byte_level_tokenizer(
        LLAMA3_CONTROL,
        vocab_size=vocab_size,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
    )
    tokenizer.chat_template = LLAMA3_CHAT
    return tokenizer


def chatml_tokenizer(*, vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Qwen markup: no BOS token, a default system text, and two added tokens that are not special."""
    tokenizer = byte_level_tokenizer(
        CHATML_CONTROL, vocab_size=vocab_size, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_tokens(list(CHATML_ADDED))
    tokenizer.chat_template = CHATML_CHAT
    return tokenizer


def plain_tokenizer(*, vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """`<pad>`, `<bos>`, `<eos>` and no chat template, like the tokenizer of a base model."""
    return byte_level_tokenizer(
        PLAIN_CONTROL, vocab_size=vocab_size, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
