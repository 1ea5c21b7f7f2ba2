"""An index directory and what it remembers: `blockrag.json`, the choices it was built with.

    DIR/blockrag.json   model, encoder, attention, precision, passage length, byte budget
    DIR/index/          the passages
    DIR/kv/             their KV states

So a question needs no more than the directory. What is remembered never decides silently against what was asked: a
different encoder is an error, a different model an error when documents are ingested (unless it is meant) and a note
when a question is asked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from blockrag.cli.options import PrecisionChoice
from blockrag.cli.output import Output, quiet_transformers
from blockrag.errors import InputError, PassageIndexError

if TYPE_CHECKING:
    from blockrag.codec import Precision
    from blockrag.index import PassageIndex
    from blockrag.model.block_model import Attention
    from blockrag.rag import BlockRAG
    from blockrag.stores import BlockStore

__all__ = [
    "SETTINGS_FILE",
    "Settings",
    "built_with",
    "find_settings",
    "model_name",
    "open_parts",
    "open_rag",
    "open_settings",
    "prepare",
    "remember",
]

SETTINGS_FILE = "blockrag.json"
_FORMAT = 1
_MOST_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Settings:
    """What a directory was built with.

    Args:
        model: "demo", a hub id, or the absolute path of a saved model.
        encoder: What `open_encoder` takes.
        attention: "block" or "full".
        precision: Of the stored KV states; None for the model's default.
        max_passage_tokens: Longest passage, in the model's tokens.
        max_bytes: Byte budget of the stored KV states; None for no limit.
    """

    model: str = "demo"
    encoder: str = "lexical"
    attention: Attention = "block"
    precision: Precision | None = None
    max_passage_tokens: int = 256
    max_bytes: int | None = None


def model_name(model: str) -> str:
    """A model as it is remembered: a directory by its absolute path, anything else as it is.

    Raises:
        InputError: It is written as a path, and there is no such directory.
    """
    if model == "demo":
        return model
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.is_absolute() or model.startswith((".", "~")) or path.exists():
        raise InputError(f"no model directory {model!r}; pass a directory with config.json and weights, or a hub id")
    return model


def find_settings(path: Path) -> Settings | None:
    """What a directory remembers; None if it remembers nothing.

    Raises:
        InputError: The path is a file.
        PassageIndexError: The file in it is damaged.
    """
    from blockrag.index.files import open_regular

    file = path / SETTINGS_FILE
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; pass the directory that holds the index")
    try:
        with open_regular(file) as opened:
            # A handful of short values; more than this is somebody else's file, or a trap.
            content = opened.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        raw = json.loads(content.decode("utf-8"))
        if raw.pop("format") != _FORMAT:
            raise PassageIndexError(f"{file} was written by another release of blockrag; use that one, or a new --path")
        return _checked(Settings(**raw))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(
            f"{file} cannot be read ({error.strerror or error}); check what it is, and its permissions"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PassageIndexError(
            f"{file} is damaged ({error!s:.300}); delete it and run `blockrag ingest` again with the --model and "
            "--encoder that the directory was built with: nothing else is lost"
        ) from error


def remember(path: Path, settings: Settings) -> None:
    """Write `blockrag.json`, whole or not at all.

    Raises:
        InputError: The directory cannot be written.
    """
    file = path / SETTINGS_FILE
    temporary = file.with_name(f".{SETTINGS_FILE}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps({"format": _FORMAT, **asdict(settings)}, indent=2) + "\n", "utf-8")
        temporary.replace(file)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise InputError(f"{file} cannot be written ({error.strerror}); pass a --path that can") from error


def prepare(
    path: Path,
    *,
    model: str | None = None,
    encoder: str | None = None,
    attention: Attention | None = None,
    precision: Precision | None = None,
    max_passage_tokens: int | None = None,
    max_bytes: int | None = None,
    switch_model: bool = False,
) -> Settings:
    """The settings to ingest with: those remembered, changed by those asked for. Makes the directory.

    Raises:
        InputError: The directory cannot be made, or holds an index of another encoder, or of another model and
            `switch_model` is off.
        PassageIndexError: The file in it is damaged.
    """
    found = find_settings(path)
    if found is None and (path / "index").exists() and (model is None or encoder is None):
        raise InputError(f"{path} does not say what it was built with (no {SETTINGS_FILE}); pass --model and --encoder")
    known = found or Settings()
    wanted = known.model if model is None else model_name(model)
    if found is not None and wanted != known.model and not switch_model:
        raise InputError(
            f"{path} was built with model {known.model!r}, not {wanted!r}; leave --model out, pass another --path, or "
            "pass --switch-model to use the new one from now on (what is stored for the old one stays)"
        )
    if found is not None and encoder not in (None, known.encoder):
        raise InputError(
            f"{path} was built with encoder {known.encoder!r}, not {encoder!r}; leave --encoder out, or pass another "
            "--path"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the directory {path} cannot be made ({error.strerror}); pass another --path") from error
    changes = {
        "encoder": encoder,
        "attention": attention,
        "precision": precision,
        "max_passage_tokens": max_passage_tokens,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    settings = replace(known, model=wanted, max_bytes=known.max_bytes if max_bytes is None else max_bytes)
    return replace(settings, **given)  # type: ignore[arg-type]


def built_with(path: Path, encoder: str | None = None) -> Settings | None:
    """What a directory that holds an index remembers; None where the Python API built it, which writes nothing down.

    Raises:
        InputError: There is no index, or it was built with another encoder than the one asked for.
        PassageIndexError: Its `blockrag.json` is damaged.
    """
    found = find_settings(path)
    if not (path / "index").is_dir():
        raise InputError(f"there is no index at {path}; make one with: blockrag ingest SOURCES --path {path}")
    if found is not None and encoder not in (None, found.encoder):
        raise InputError(f"{path} was built with encoder {found.encoder!r}, not {encoder!r}; leave --encoder out")
    return found


@contextmanager
def open_rag(
    out: Output, path: Path, *, model: str | None, encoder: str | None, attention: Attention | None, top_k: int
) -> Iterator[BlockRAG]:
    """The whole pipeline over a directory that exists, as it was built unless something else is asked for.

    Raises:
        InputError: See `built_with`; or there is no such model.
    """
    found = built_with(path, encoder)
    if found is None and model is None:
        raise InputError(f"{path} does not say which model it was built with (no {SETTINGS_FILE}); pass --model")
    known = found or Settings(encoder=encoder or Settings().encoder)
    wanted = known.model if model is None else model_name(model)
    if model is None and Path(wanted).is_absolute() and not Path(wanted).is_dir():
        raise InputError(f"{path} was built with the model in {wanted}, which is gone; pass --model with its new place")
    if found is not None and wanted != found.model:
        out.note(
            f"note: {path} was built with model {found.model!r}; blocks that {wanted!r} lacks are computed now and "
            "stored beside the others"
        )
    settings = replace(known, model=wanted, attention=attention or known.attention)
    with open_settings(out, path, settings) as rag:
        rag.top_k = top_k
        yield rag


@contextmanager
def open_settings(out: Output, path: Path, settings: Settings) -> Iterator[BlockRAG]:
    """The whole pipeline, opened and closed."""
    with out.working(f"loading {settings.model} ..."):
        from blockrag.rag import BlockRAG

        quiet_transformers()
        rag = BlockRAG.from_pretrained(
            settings.model,
            encoder=settings.encoder,
            path=path,
            attention=settings.attention,
            precision=settings.precision,
            max_bytes=settings.max_bytes,
        )
    with rag:
        yield rag


@contextmanager
def open_parts(path: Path) -> Iterator[tuple[PassageIndex, BlockStore]]:
    """The index and the store of a directory, without its language model.

    Raises:
        InputError: See `built_with`.
    """
    settings = built_with(path) or Settings()
    from blockrag.encoders import open_encoder
    from blockrag.index import PassageIndex
    from blockrag.stores import DiskStore

    quiet_transformers()
    with ExitStack() as stack:
        index = stack.enter_context(PassageIndex(open_encoder(settings.encoder), path / "index"))
        store = DiskStore(path / "kv", max_bytes=settings.max_bytes)
        stack.callback(store.close)
        yield index, store


def _checked(settings: Settings) -> Settings:
    """Refuse values of a wrong type, which dataclasses accept."""
    for field in fields(Settings):
        value = getattr(settings, field.name)
        text = field.name in ("model", "encoder", "attention", "precision")
        optional = value is None and field.name in ("precision", "max_bytes")
        valid = optional or isinstance(value, str if text else int)
        if not valid or isinstance(value, bool):
            raise TypeError(f"{field.name} cannot be {value!r:.100}")
        if not text and value is not None and not 1 <= value < 1 << 63:
            raise ValueError(f"{field.name} cannot be {value!r:.100}")
    if settings.attention not in ("block", "full"):
        raise ValueError(f"attention cannot be {settings.attention!r:.100}")
    if settings.precision not in (None, *PrecisionChoice.__members__):
        raise ValueError(f"precision cannot be {settings.precision!r:.100}")
    return settings
