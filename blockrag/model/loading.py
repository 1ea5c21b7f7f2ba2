"""Loading a causal language model and its tokenizer from a directory or a hub id, with errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from blockrag.demo import checkpoint_path
from blockrag.errors import InputError
from blockrag.model.facts import FACTS_FILE, BlockAttentionFacts, load_facts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_pretrained", "load_tokenizer", "load_without_weights", "resolve_device", "resolve_dtype", "source_of"]

# Left unsaid, transformers asks on the terminal whether to run a checkpoint's code, and one letter runs it.
_SAFELY = {"trust_remote_code": False}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str | torch.device) -> torch.device:
    """The device a string names; "auto" is the first CUDA device, or the CPU.

    Raises:
        InputError: The string names no device, or one this machine lacks.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.zeros(1, device=resolved).item()
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f'device {device!r} cannot be used ({reason}); pass "auto", "cpu" or "cuda"') from error
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | str:
    """The dtype to compute in; "auto" is the checkpoint's own on a GPU and float32 on a CPU.

    Processors without bfloat16 units multiply bfloat16 matrices at an eighth of their float32 rate.

    Raises:
        InputError: The string names no supported dtype.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in _DTYPES:
        raise InputError(f'dtype {dtype!r} is not one of "auto", {", ".join(map(repr, _DTYPES))}')
    return _DTYPES[dtype]


def load_pretrained(
    id_or_path: str | Path,
    *,
    device: torch.device,
    dtype: torch.dtype | str,
    revision: str | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, BlockAttentionFacts]:
    """Load a model for inference, its tokenizer, and what it says about block attention.

    "demo" is the small model that ships with blockrag.

    A checkpoint's own code is never run, and nobody is asked whether it may be.

    Raises:
        InputError: The directory or hub id does not exist, or holds no causal language model.
    """
    name = source_of(id_or_path)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, revision=revision, output_loading_info=True, **_SAFELY
        )
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, **_SAFELY)
    except Exception as error:
        raise _cannot_load(name, error) from error
    if missing := sorted(found["missing_keys"]):
        # transformers only logs this, and fills them with random numbers.
        raise InputError(
            f"{name!r} lacks {len(missing)} weights of {type(model).__name__} (the first is {missing[0]}); "
            "pass a complete checkpoint of a causal language model"
        )
    return model.to(device).eval(), tokenizer, _facts_of(name, revision)


def load_without_weights(id_or_path: str | Path, *, revision: str | None = None) -> PreTrainedModel:
    """A model of a saved configuration on torch's meta device: it has shapes, and no numbers.

    Its configuration names the dtype it was saved in, as always; the parameters have another.

    Raises:
        InputError: The directory or hub id does not exist, or is not that of a causal language model.
    """
    name = source_of(id_or_path)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, **_SAFELY)
        saved_as = config.dtype
        with torch.device("meta"):
            # In the dtype that every kernel takes: those of experts refuse float32.
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except Exception as error:
        raise _cannot_load(name, error) from error
    model.config.dtype = saved_as
    return model.eval()


def load_tokenizer(
    id_or_path: str | Path, *, revision: str | None = None
) -> tuple[PreTrainedTokenizerBase, BlockAttentionFacts]:
    """A model's tokenizer and what its checkpoint says about block attention, without its weights.

    Raises:
        InputError: The directory or hub id does not exist, or holds no tokenizer.
    """
    name = source_of(id_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, **_SAFELY)
    except Exception as error:
        raise _cannot_load(name, error) from error
    return tokenizer, _facts_of(name, revision)


def source_of(id_or_path: str | Path) -> str:
    """What transformers is asked to load: "demo" is the checkpoint that ships with blockrag."""
    return str(checkpoint_path() if id_or_path == "demo" else id_or_path)


def _cannot_load(name: str, error: Exception) -> InputError:
    """What to raise: damaged weights and tokenizers raise plain Exception and RuntimeError from their libraries."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    if "trust_remote_code" in str(error):
        reason = "it needs Python code that comes with it, which blockrag never runs."
    return InputError(
        f"cannot load a causal language model from {name!r}: {reason} "
        "Pass a directory with config.json and weights, or a Hugging Face model id."
    )


def _facts_of(name: str, revision: str | None) -> BlockAttentionFacts:
    facts_path = cached_file(
        name,
        FACTS_FILE,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return BlockAttentionFacts() if facts_path is None else load_facts(Path(facts_path))
