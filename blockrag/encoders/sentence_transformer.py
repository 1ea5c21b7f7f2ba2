"""Any sentence-transformers model as an encoder; the only room that knows that library.

The model's own pipeline decides pooling, normalization and prompts: questions go through `encode_query`, passages
through `encode_document`, so models that prefix "query: " and "passage: " get what they were trained with. Similarity
is the inner product whatever the model card says; for models that normalize, that is the cosine.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blockrag.encoders.protocol import Vectors
from blockrag.errors import InputError

if TYPE_CHECKING:
    from blockrag.passage import Passage

__all__ = ["SentenceTransformerEncoder", "passage_text"]


def passage_text(passage: Passage) -> str:
    """What a trained encoder reads of a passage: title, one space, text (as Contriever and DPR do)."""
    return f"{passage.title} {passage.text}" if passage.title else passage.text


class SentenceTransformerEncoder:
    """A sentence-transformers model, from a local directory or the Hugging Face hub.

    Its name holds a digest of the weights, the tokenizer and the pipeline, so that a model that was moved keeps its
    name and one that was retrained in place does not.

    Args:
        model_id_or_path: A directory or a hub id.
        device: "auto" takes a GPU where there is one; else any torch device string.
        batch_size: Texts per forward pass.
        max_tokens: Texts are cut here; None keeps the model's own limit, which is never exceeded.

    Raises:
        InputError: The model cannot be loaded, or a number is not positive.
    """

    _kind = "sentence-transformer"

    def __init__(
        self,
        model_id_or_path: str | Path,
        *,
        device: str = "auto",
        batch_size: int = 32,
        max_tokens: int | None = None,
    ) -> None:
        if batch_size < 1 or (max_tokens is not None and max_tokens < 1):
            raise InputError(f"batch_size {batch_size} and max_tokens {max_tokens} must be at least 1")
        self._model = _load(str(model_id_or_path), None if device == "auto" else device, self._model_options())
        if max_tokens is not None:
            limit = self._model.max_seq_length
            self._model.max_seq_length = min(max_tokens, limit) if limit else max_tokens
        self._batch_size = batch_size
        # Fast tokenizers keep padding and truncation as state and refuse to be borrowed by two threads.
        self._lock = threading.Lock()
        self._dimension = int(self._encode(["x"], query=True).shape[1])
        self._name = f"{self._kind}-{_digest(self._model)}-{self._model.max_seq_length}"

    @property
    def name(self) -> str:
        """Kind, digest of weights, tokenizer and pipeline, and the token limit."""
        return self._name

    @property
    def dimension(self) -> int:
        """Length of every vector."""
        return self._dimension

    def encode_queries(self, questions: Sequence[str]) -> Vectors:
        """`[len(questions), dimension]` float32."""
        return self._encode(questions, query=True)

    def encode_passages(self, passages: Sequence[Passage]) -> Vectors:
        """`[len(passages), dimension]` float32, of title and text."""
        return self._encode([passage_text(passage) for passage in passages], query=False)

    def _encode(self, texts: Sequence[str], *, query: bool) -> Vectors:
        if not texts:
            return np.zeros((0, self._dimension), dtype=np.float32)
        encode = self._model.encode_query if query else self._model.encode_document
        with self._lock:
            vectors = encode(list(texts), batch_size=self._batch_size, show_progress_bar=False, convert_to_numpy=True)
        return np.ascontiguousarray(vectors, dtype=np.float32)

    @staticmethod
    def _model_options() -> dict[str, Any]:
        return {}


def _load(model_id_or_path: str, device: str | None, options: dict[str, Any]) -> Any:
    """The loaded model in evaluation mode, or `InputError` saying what to pass instead."""
    import torch
    from sentence_transformers import SentenceTransformer

    looks_local = model_id_or_path.startswith((".", "/", "~")) or model_id_or_path.count("/") > 1
    path = Path(model_id_or_path).expanduser()
    if looks_local and not path.is_dir():
        raise InputError(f"no encoder directory at {model_id_or_path!r}; pass a model directory or a hub id")
    source = str(path) if path.is_dir() else model_id_or_path
    try:
        model = SentenceTransformer(source, device=device, model_kwargs={"dtype": torch.float32, **options})
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise InputError(
            f"cannot load the encoder {model_id_or_path!r} ({type(error).__name__}: {error}); pass the directory of a "
            "sentence-transformers or BERT-like model, or a hub id while the hub can be reached"
        ) from error
    return model.eval()


def _digest(model: Any) -> str:
    """16 hex digits over weights, tokenizer and pipeline: what decides the vectors, and not where the files lie.

    Parameters are taken without their names, which change between library releases; an unused pooler, which loading
    may fill at random, is left out.
    """
    import xxhash

    weights = sorted(
        xxhash.xxh3_128_hexdigest(f"{tuple(value.shape)}".encode() + value.detach().cpu().float().numpy().tobytes())
        for name, value in model.named_parameters()
        if ".pooler." not in name
    )
    facts = {
        "weights": weights,
        "tokenizer": _tokenizer_facts(model.tokenizer),
        "modules": [type(module).__name__ for module in model],
        "pooling": [pooling_mode(module) for module in model],
        "prompts": dict(model.prompts or {}),
        "default_prompt": model.default_prompt_name,
    }
    return xxhash.xxh3_64_hexdigest(json.dumps(facts, sort_keys=True).encode())


def pooling_mode(module: Any) -> str:
    """A pipeline module's pooling ("mean", "cls", ...), or "" when it does not pool."""
    describe = getattr(module, "get_pooling_mode_str", None)
    return str(describe()) if describe is not None else str(getattr(module, "pooling_mode", ""))


def _tokenizer_facts(tokenizer: Any) -> str:
    """The tokenizer as JSON without its mutable padding and truncation state; its vocabulary where it has no JSON."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        vocabulary: dict[str, int] = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
        return json.dumps(sorted(vocabulary.items()))
    facts: dict[str, Any] = json.loads(backend.to_str())
    return json.dumps({key: value for key, value in facts.items() if key not in ("padding", "truncation")})
