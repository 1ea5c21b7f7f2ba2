"""Contriever: a BERT encoder with masked mean pooling, no normalization, and the dot product.

Source: Izacard et al., "Unsupervised Dense Information Retrieval with Contrastive Learning" (arXiv 2112.09118) and
the model card of facebook/contriever: token states are averaged over the attention mask, a passage is read as
title, one space, text, and similarity is the plain dot product. Frameworks that normalize the vectors rank by cosine
instead, which is not what the model was trained for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blockrag.encoders.sentence_transformer import SentenceTransformerEncoder, pooling_mode
from blockrag.errors import InputError

__all__ = ["DEFAULT_CONTRIEVER", "ContrieverEncoder"]

DEFAULT_CONTRIEVER = "facebook/contriever-msmarco"


class ContrieverEncoder(SentenceTransformerEncoder):
    """Contriever, or any BERT-like checkpoint to be used as it is used.

    Args:
        model_id_or_path: A directory holding config, tokenizer and weights, or a hub id.
        device: "auto" takes a GPU where there is one; else any torch device string.
        batch_size: Texts per forward pass.
        max_tokens: Texts are cut here, special tokens included; the model's own limit is never exceeded.

    Raises:
        InputError: The model cannot be loaded, or brings a pipeline of its own that is not mean pooling alone.
    """

    _kind = "contriever"

    def __init__(
        self,
        model_id_or_path: str | Path = DEFAULT_CONTRIEVER,
        *,
        device: str = "auto",
        batch_size: int = 32,
        max_tokens: int = 512,
    ) -> None:
        super().__init__(model_id_or_path, device=device, batch_size=batch_size, max_tokens=max_tokens)
        pooling = [pooling_mode(module) for module in self._model]
        if pooling != ["", "mean"]:
            modules = ", ".join(type(module).__name__ for module in self._model)
            raise InputError(
                f"{str(model_id_or_path)!r} is a pipeline of its own ({modules}), not a bare encoder to pool by the "
                f"mean; open it as 'st:{model_id_or_path}'"
            )

    @staticmethod
    def _model_options() -> dict[str, Any]:
        # The published checkpoints hold no pooler; without this, loading would fill one at random and report it.
        return {"add_pooling_layer": False}
