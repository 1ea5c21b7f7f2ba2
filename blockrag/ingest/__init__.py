"""From files to passages whose KV states are already stored, in one resumable pass.

    reading.py    files, folders and objects to documents
    splitting.py  documents to passages, by the language model's tokens
    pipeline.py   documents to index and block store, batch by batch; and back out again
    checking.py   whether what lies in a directory is what was written
    prebuild.py   KV states ahead of the question, each block for itself
    passage_store.py  passages whose vectors and documents are somebody else's: what frameworks' stores are made of
    report.py     what a pass did
    progress.py   how far it is, for people who wait

Importing this package imports nothing but the standard library: each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockrag.ingest.checking import DirectoryReport, check_directory
    from blockrag.ingest.passage_store import PassageStore, PassageStoreStats
    from blockrag.ingest.pipeline import delete, delete_unused_blocks, ingest
    from blockrag.ingest.prebuild import PrebuildReport, encode_blocks, prebuild_blocks
    from blockrag.ingest.progress import Progress, RichProgress
    from blockrag.ingest.reading import Document, DocumentFailure, read_documents
    from blockrag.ingest.report import IngestReport
    from blockrag.ingest.splitting import split_document

__all__ = [
    "DirectoryReport",
    "Document",
    "DocumentFailure",
    "IngestReport",
    "PassageStore",
    "PassageStoreStats",
    "PrebuildReport",
    "Progress",
    "RichProgress",
    "check_directory",
    "delete",
    "delete_unused_blocks",
    "encode_blocks",
    "ingest",
    "prebuild_blocks",
    "read_documents",
    "split_document",
]

_HOMES = {
    "DirectoryReport": "checking",
    "Document": "reading",
    "DocumentFailure": "reading",
    "IngestReport": "report",
    "PassageStore": "passage_store",
    "PassageStoreStats": "passage_store",
    "PrebuildReport": "prebuild",
    "Progress": "progress",
    "RichProgress": "progress",
    "check_directory": "checking",
    "delete": "pipeline",
    "delete_unused_blocks": "pipeline",
    "encode_blocks": "prebuild",
    "ingest": "pipeline",
    "prebuild_blocks": "prebuild",
    "read_documents": "reading",
    "split_document": "splitting",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
