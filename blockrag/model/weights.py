"""Which weights a model was loaded with, without reading them all again: remembered by the identity of its files.

The digest of a model's weights is its content (`blockrag.model.identity`), and reading 16 GB for it takes seconds at
every start. A small file in the user's cache directory keeps it under the identity of the checkpoint: each file's real
path, device, inode, size and times, the dtype, the library. A file's ctime cannot be set back, so weights that were
rewritten in place are another identity even where size and mtime were restored. A sample of every tensor is compared
all the same; where it differs, everything is read.

The digest is taken while nobody else has the model, and holds for as long as its tensors are the ones that were loaded,
untouched. Nothing is remembered of models that were passed in, adapted, or loaded from other files than safetensors.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import cached_file

from blockrag.fingerprint import check_fingerprint, hash_json
from blockrag.model.identity import adapter_factor, library_factor, weights_factor
from blockrag.model.loading import load_pretrained, source_of
from blockrag.user_cache import refuse_foreign, user_cache_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from blockrag.model.facts import BlockAttentionFacts

__all__ = ["LoadedWeights", "load_identified"]

logger = logging.getLogger(__name__)

_CACHE_FILE = "weights.json"
_FORMAT = 1
_MOST_ENTRIES = 128
_MOST_BYTES = 1 << 20
_SAMPLES = 256
# A file that changed this recently may change again within one tick of its file system's clock.
_SETTLED_NS = 2_000_000_000
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """The weights of a model as they were loaded.

    Args:
        digest: The weights' factor of the fingerprint.
        sample: Digest of a sample of every tensor.
        places: Where each tensor lay, and how often it had been written to.
    """

    digest: str
    sample: str
    places: tuple[tuple[str, int, int], ...]

    def still_of(self, model: PreTrainedModel) -> bool:
        """Whether the model's tensors are those that were loaded, untouched since."""
        return _places(model) == self.places and _sample(model) == self.sample


def load_identified(
    id_or_path: str | Path, *, device: torch.device, dtype: torch.dtype | str, revision: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, BlockAttentionFacts, LoadedWeights | None]:
    """`load_pretrained`, and the identity of the weights; None where it is better found when it is needed.

    Raises:
        InputError: See `load_pretrained`.
    """
    before = _files(id_or_path, revision)
    model, tokenizer, facts = load_pretrained(id_or_path, device=device, dtype=dtype, revision=revision)
    files = before if before == _files(id_or_path, revision) else None
    return model, tokenizer, facts, _identified(model, files)


def _identified(model: PreTrainedModel, files: list[list[object]] | None) -> LoadedWeights | None:
    if files is None or adapter_factor(model) != "none":
        return None
    try:
        places, sample = _places(model), _sample(model)
    except (RuntimeError, NotImplementedError):
        # Tensors of another kind: without a version (inference mode), without memory (offloaded), packed.
        return None
    key = hash_json([files, str(model.dtype), model.device.type, type(model).__name__, library_factor()])
    known = _read().get(key)
    if known is not None and known["sample"] == sample:
        return LoadedWeights(known["weights"], sample, places)
    digest = weights_factor(model)
    newest = max(int(str(changed)) for *_, changed in files)
    if time.time_ns() - newest > _SETTLED_NS:
        _remember(key, {"weights": digest, "sample": sample})
    return LoadedWeights(digest, sample, places)


def _files(id_or_path: str | Path, revision: str | None) -> list[list[object]] | None:
    """The identity of a checkpoint's files: those whose content the weights are, and those that say so.

    Real path, device, inode, size, mtime and ctime of each; None where it has other weights than safetensors.
    """
    directory = _directory(source_of(id_or_path), revision)
    if directory is None:
        return None
    try:
        # What transformers looks for, in its order.
        names = ["model.safetensors"]
        if not (directory / names[0]).exists():
            shards = json.loads((directory / _INDEX).read_text("utf-8"))["weight_map"].values()
            names = [_INDEX, *sorted(set(shards))]
        return [_file_identity(directory / name) for name in ("config.json", *names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _directory(name: str, revision: str | None) -> Path | None:
    """Where a checkpoint's files lie; None where they have not been downloaded yet."""
    if Path(name).is_dir():
        return Path(name)
    try:
        config = cached_file(
            name,
            "config.json",
            revision=revision,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:
        # Neither a directory nor a hub id: loading says so.
        return None
    return None if config is None else Path(config).parent


def _file_identity(path: Path) -> list[object]:
    real = path.resolve(strict=True)
    found = real.stat()
    return [str(real), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _places(model: PreTrainedModel) -> tuple[tuple[str, int, int], ...]:
    return tuple((name, tensor.data_ptr(), tensor._version) for name, tensor in model.state_dict().items())


def _sample(model: PreTrainedModel) -> str:
    """Names, dtypes, shapes, and some evenly spaced bytes of every tensor, the first ones and the last among them."""
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        state.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        if tensor.numel():
            content = tensor.reshape(-1).view(torch.uint8)
            # Not a multiple of an element's size, so that every byte of an element has its turn.
            step = len(content) // _SAMPLES | 1
            for part in (content[::step], content[-16:]):
                state.update(part.cpu().contiguous().numpy().data)
    return state.hexdigest()


# -- the file ----------------------------------------------------------------------------------------------------------


def _read() -> dict[str, dict[str, str]]:
    """What is remembered; nothing where the file is not there, damaged, or somebody else's."""
    try:
        path = user_cache_directory() / _CACHE_FILE
        refuse_foreign(path)
        with path.open("rb") as file:
            raw = json.loads(file.read(_MOST_BYTES))
        return _checked(raw)
    except FileNotFoundError:
        return {}
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, RecursionError) as error:
        logger.info("the digests of earlier loads cannot be used, weights are read whole: %s", error)
        return {}


def _checked(raw: Any) -> dict[str, dict[str, str]]:
    """The entries of a file's content.

    Raises:
        ValueError, TypeError, KeyError: It is not what `_remember` writes.
    """
    if raw["format"] != _FORMAT:
        raise ValueError(f"format {raw['format']!r:.20}")
    return {
        check_fingerprint(key): {name: check_fingerprint(entry[name]) for name in ("weights", "sample")}
        for key, entry in dict(raw["entries"]).items()
    }


def _remember(key: str, entry: dict[str, str]) -> None:
    """Add an entry, the whole file or nothing; of two processes at once, one may lose its entry and reads again."""
    entries = {name: known for name, known in _read().items() if name != key}
    kept = dict(list(entries.items())[1 - _MOST_ENTRIES :])
    content = json.dumps({"format": _FORMAT, "entries": {**kept, key: entry}})
    temporary: Path | None = None
    try:
        directory = user_cache_directory()
        # Readable by the user alone, as mkstemp makes it.
        descriptor, name = tempfile.mkstemp(prefix=f".{_CACHE_FILE}.", dir=directory)
        temporary = Path(name)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
        temporary.replace(directory / _CACHE_FILE)
    except (OSError, RuntimeError) as error:
        logger.info("the digest of the weights cannot be kept for the next time: %s", error)
        with suppress(OSError):
            if temporary is not None:
                temporary.unlink(missing_ok=True)
