"""`ModelOutline`: what can be said about a model's blocks before its weights are there.

The shapes of its KV states, its limits, its tokenizer and its template decide which blocks documents become and how
many bytes those take. All of it follows from a few small files: a model of the same configuration is made on torch's
meta device, where tensors have shapes and no numbers, and asked for its KV states once.

Whether the model can be composed at all is for the probes to say, which need its weights (`blockrag.model.profile`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from blockrag.errors import InputError
from blockrag.model.block_model import BlockModel
from blockrag.model.choices import default_precision
from blockrag.model.loading import load_tokenizer, load_without_weights, resolve_device, resolve_dtype, source_of
from blockrag.model.profile import ModelProfile, unprobed_profile
from blockrag.prompt import template_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from blockrag.codec import Precision
    from blockrag.prompt import PromptTemplate

__all__ = ["ModelOutline"]


@dataclass(frozen=True, slots=True)
class ModelOutline:
    """What decides a model's blocks and their size.

    Args:
        name: The hub id or directory name.
        tokenizer: Counts and encodes passages.
        template: Turns a passage into its block.
        profile: The layout of its KV states and its limits; without regimes where its weights were not loaded.
        dtype: What it computes in, such as "float32".
        precision: At rest, unless another is asked for.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate
    profile: ModelProfile
    dtype: str
    precision: Precision

    @classmethod
    def of(cls, model: BlockModel) -> ModelOutline:
        """The outline of a model that is loaded.

        Raises:
            InputError: It was loaded with attention="full" because it cannot be composed.
        """
        if model.profile is None:
            raise InputError(f"{model.name} keeps no blocks: its KV states cannot be composed; plan for another model")
        dtype = str(model.model.dtype).removeprefix("torch.")
        return cls(model.name, model.tokenizer, model.template, model.profile, dtype, model.precision)

    @classmethod
    def load(
        cls,
        id_or_path: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        precision: Precision | None = None,
        revision: str | None = None,
    ) -> ModelOutline:
        """The outline of a saved model, from its configuration and its tokenizer alone.

        Args:
            id_or_path: A directory with `config.json` and a tokenizer, or a hub id.
            device: Where it would run; see `BlockModel.from_pretrained`.
            dtype: What it would compute in; see `BlockModel.from_pretrained`.
            precision: At rest; by default the one that `BlockModel` would choose.
            revision: Branch, tag or commit on the hub.

        Raises:
            InputError: There is no such model, or its shapes cannot be told without its weights.
            UnsupportedModelError: A layer keeps another state than keys and values.
        """
        tokenizer, facts = load_tokenizer(id_or_path, revision=revision)
        name = source_of(id_or_path)
        chosen = resolve_dtype(dtype, resolve_device(device))
        model = load_without_weights(id_or_path, revision=revision)
        try:
            profile = unprobed_profile(model)
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"what {name!r} keeps per token cannot be told from its configuration alone ({reason}); pass a "
                "directory that holds its weights too, and let them be loaded"
            ) from error
        # The rule of `BlockModel.from_pretrained`.
        computes = chosen if isinstance(chosen, torch.dtype) else model.config.dtype or torch.float32
        return cls(
            name=Path(name).name if Path(name).is_dir() else name,
            tokenizer=tokenizer,
            template=facts.template or template_for(tokenizer, name_or_path=tokenizer.name_or_path),
            profile=profile,
            dtype=str(computes).removeprefix("torch."),
            precision=precision or default_precision(computes),
        )
