r"""The named templates. Their strings are part of a model's training: change one and count its version up.

`tulu` and `llama3` are the forms of the published Block-Attention checkpoints and data (arXiv 2409.15355), including
that a Tulu prompt has no begin-of-sequence token and merges the system text into the user turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from blockrag.prompt.template import PromptTemplate, Turn

__all__ = ["INSTRUCTION", "SYSTEM", "TEMPLATES"]

SYSTEM = (
    "You are an intelligent AI assistant. Please answer questions based on the user's instructions. "
    "Below are some reference documents that may help you in answering the user's question.\n\n"
)
INSTRUCTION = (
    "Please write a high-quality answer for the given question using only the provided search documents "
    "(some of which might be irrelevant).\nQuestion: {question}"
)

_TULU = PromptTemplate(
    name="tulu",
    version=1,
    prefix="<|user|>\n" + SYSTEM,
    query=f"\n\n{INSTRUCTION}\n<|assistant|>\n",
    system=Turn("<|system|>\n", "\n"),
    user=Turn("<|user|>\n", "\n"),
    assistant=Turn("<|assistant|>\n", "<|end_of_text|>\n"),
    generation="<|assistant|>\n",
    follow_up_open="<|end_of_text|>\n<|user|>\n",
    follow_up_query=f"\n\n{INSTRUCTION}\n<|assistant|>\n",
    stop=("<|end_of_text|>",),
)

_LLAMA3 = PromptTemplate(
    name="llama3",
    version=1,
    prefix="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n" + SYSTEM,
    query=(
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        f"{INSTRUCTION}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    conversation_start="<|begin_of_text|>",
    system=Turn("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    user=Turn("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    assistant=Turn("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    generation="<|start_header_id|>assistant<|end_header_id|>\n\n",
    strip_turns=True,
    follow_up_open="<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
    follow_up_query=f"{INSTRUCTION}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    stop=("<|eot_id|>", "<|end_of_text|>"),
)

_CHATML = PromptTemplate(
    name="chatml",
    version=1,
    prefix="<|im_start|>system\n" + SYSTEM,
    query=f"<|im_end|>\n<|im_start|>user\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n",
    system=Turn("<|im_start|>system\n", "<|im_end|>\n"),
    user=Turn("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=Turn("<|im_start|>assistant\n", "<|im_end|>\n"),
    generation="<|im_start|>assistant\n",
    follow_up_open="<|im_end|>\n<|im_start|>user\n",
    follow_up_query=f"{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n",
    stop=("<|im_end|>", "<|endoftext|>"),
)

_PLAIN = PromptTemplate(
    name="plain",
    version=1,
    prefix="{bos}Answer the question using the documents.\n",
    passage="Title: {title}\n{text}\n",
    passage_untitled="{text}\n",
    query="Question: {question}\nAnswer:",
    conversation_start="{bos}",
    system=Turn("", "\n"),
    user=Turn("Question: ", "\n"),
    assistant=Turn("Answer: ", "\n"),
    generation="Answer:",
    follow_up_open="\n",
    follow_up_query="Question: {question}\nAnswer:",
    stop=("\nQuestion:", "\nTitle:"),
)

TEMPLATES: Mapping[str, PromptTemplate] = MappingProxyType(
    {
        "tulu": _TULU,
        # Trained with the prefix (its data preparation adds it to block 0); published inference code leaves it out.
        "tulu-block": replace(_TULU, name="tulu-block", block_attention_prefix="[Block-Attention]"),
        "llama3": _LLAMA3,
        "chatml": _CHATML,
        "plain": _PLAIN,
    }
)
"""Named templates; `tulu-block` is `tulu` with the prefix its checkpoints were trained with."""
