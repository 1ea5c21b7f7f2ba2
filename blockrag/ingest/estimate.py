"""How many documents a pass will see, told before it begins, so that a progress bar can say when it will end.

Only for display: it counts files and lines without reading what they mean, and gives up (None) where counting would
cost as much as reading. Nothing depends on the number being right.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from blockrag.ingest.reading import RECORD_SUFFIXES, Document, Source
from blockrag.passage import Passage

__all__ = ["expected_documents"]

_LINE_SUFFIXES = frozenset({".jsonl", ".ndjson", ".jsonlines", ".tsv"})
_CHUNK_BYTES = 1 << 20


def expected_documents(sources: Source | Iterable[Source]) -> int | None:
    """About how many documents `read_documents` will yield.

    Args:
        sources: What `read_documents` takes. An iterable that can be read only once is left alone.

    Returns:
        A number; None where it cannot be known without reading.
    """
    if isinstance(sources, (str, Path, Document, Passage)):
        sources = [sources]
    if not isinstance(sources, Sequence):
        return None
    total = 0
    previous = ""
    for source in sources:
        document_id = source.document_id if isinstance(source, Passage) else ""
        # Passages of one document that follow one another count once.
        if isinstance(source, (str, Path)):
            counted = _in_path(Path(source))
            if counted is None:
                return None
            total += counted
        elif not document_id or document_id != previous:
            total += 1
        previous = document_id
    return total


def _in_path(path: Path) -> int | None:
    """Documents in a file or folder; 0 for what is not there, which the pass will report."""
    try:
        if not path.is_dir():
            return _in_file(path) if path.is_file() else 0
        total = 0
        for folder, folders, files in os.walk(path):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                counted = 0 if name.startswith(".") else _in_file(Path(folder) / name)
                if counted is None:
                    return None
                total += counted
    except (OSError, ValueError):
        return None
    return total


def _in_file(path: Path) -> int | None:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packed = suffixes[-1:] == [".gz"]
    suffix = (suffixes[:-1] if packed else suffixes)[-1:]
    if not suffix or suffix[0] not in RECORD_SUFFIXES:
        return 1
    if packed or suffix[0] not in _LINE_SUFFIXES:
        return None
    with path.open("rb") as file:
        lines = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(_CHUNK_BYTES), b""))
    return max(0, lines - 1) if suffix[0] == ".tsv" else lines
