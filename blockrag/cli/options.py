"""The options that several commands share, so that they mean and say the same everywhere."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from blockrag.codec import Precision
    from blockrag.model.block_model import Attention
    from blockrag.model.sampling import GenerationOptions

__all__ = [
    "AsJson",
    "AttentionChoice",
    "AttentionOption",
    "Device",
    "Dtype",
    "Encoder",
    "IndexPath",
    "MaxNewTokens",
    "Model",
    "NamespaceOption",
    "OnMissChoice",
    "OnMissOption",
    "PrecisionChoice",
    "PrecisionOption",
    "Seed",
    "Temperature",
    "TopK",
    "attention_of",
    "generation_options",
    "precision_of",
]


class AttentionChoice(str, Enum):
    """How passages are attended to."""

    block = "block"
    full = "full"


class PrecisionChoice(str, Enum):
    """How the numbers of stored KV states are kept."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    int8 = "int8"
    int4 = "int4"


class OnMissChoice(str, Enum):
    """What to do where passages are not stored."""

    compute = "compute"
    full = "full"
    error = "error"


AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")]
IndexPath = Annotated[Path, typer.Option("--path", envvar="BLOCKRAG_PATH", help="Directory of the index.")]
Model = Annotated[
    str | None,
    typer.Option("--model", help="'demo', a hub id or a directory; by default what the directory was built with."),
]
Encoder = Annotated[
    str | None,
    typer.Option("--encoder", help="'lexical', 'contriever' or 'st:MODEL'; by default what it was built with."),
]
AttentionOption = Annotated[
    AttentionChoice | None,
    typer.Option("--attention", help="'block' reuses stored blocks, 'full' computes the whole prompt."),
]
PrecisionOption = Annotated[
    PrecisionChoice | None,
    typer.Option("--precision", help="Of the stored KV states; by default 16 bits, or what was used before."),
]
OnMissOption = Annotated[
    OnMissChoice,
    typer.Option(
        "--on-miss",
        help="Where passages are not stored: 'compute' them, answer in 'full' attention, or end with an 'error'.",
    ),
]
NamespaceOption = Annotated[
    str,
    typer.Option(
        "--namespace",
        envvar="BLOCKRAG_NAMESPACE",
        help="Blocks of one namespace are found from no other; for a --store that several share.",
    ),
]
TopK = Annotated[int, typer.Option("-k", "--top-k", min=0, help="Passages per question.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 for greedy decoding, else sampling.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")]
Device = Annotated[str, typer.Option("--device", help="'auto', 'cpu', 'cuda', 'cuda:1', ...")]
Dtype = Annotated[str, typer.Option("--dtype", help="'auto', 'float32', 'bfloat16' or 'float16'.")]


def attention_of(choice: AttentionChoice | None) -> Attention | None:
    """The choice as the library takes it."""
    return None if choice is None else choice.value


def precision_of(choice: PrecisionChoice | None) -> Precision | None:
    """The choice as the library takes it."""
    return None if choice is None else choice.value


def generation_options(max_new_tokens: int, temperature: float, seed: int | None) -> GenerationOptions:
    """The library's options.

    Raises:
        InputError: A value is out of range.
    """
    from blockrag.model.sampling import GenerationOptions

    return GenerationOptions(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
