"""`ObjectServer`: what lies where in a bucket, or in a directory laid out like one, and how it is written once.

Below the prefix of the URL lie

    format.json                     {"format": 1}, written before the first block; another version is refused by name
    blocks/ab/<62 hex digits>       the encoded block whose key begins with ab
    fingerprints/<32 hex digits>.json

Through obstore (developmentseed.org/obstore), which treats S3, Google Cloud Storage, Azure and directories alike. It
writes a file beside its place and links it there, so that no reader sees half a block, but it does not synchronise to
the medium (a block lost to a power failure is a miss), and leaves the staging file of a killed writer behind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

import obstore
from obstore.exceptions import AlreadyExistsError, NotSupportedError
from obstore.store import LocalStore

from blockrag import codec
from blockrag.errors import DamagedBlockError, StoreError
from blockrag.stores.object_backend import FAULTS, ObjectOptions, check_object_url, connect, explain
from blockrag.stores.object_directory import ObjectDirectory
from blockrag.stores.remote import Explained
from blockrag.stores.remote_store import shown_url
from blockrag.stores.urls import parse_store_url

__all__ = ["ObjectServer", "key_of"]

_FORMAT: Final = 1
_FORMAT_NAME: Final = "format.json"
_BLOCK_NAME: Final = re.compile(r"blocks/([0-9a-f]{2})/([0-9a-f]{62})")
_FINGERPRINT_NAME: Final = re.compile(r"fingerprints/([0-9a-f]{32})\.json")
_LISTED_AT_ONCE: Final = 1000


class ObjectServer:
    """Objects below a prefix. A `Server`; the methods beyond it raise the same.

    Args:
        url: The URL without parameters, see `ObjectStore`.
        deadline_s: Seconds that one request waits which is not patient.
        options: The parameters.

    Raises:
        InputError: A URL or option that cannot be used.
    """

    faults: tuple[type[Exception], ...] = FAULTS
    keys_per_question: int = 1

    def __init__(self, url: str, deadline_s: float, options: ObjectOptions) -> None:
        parts = parse_store_url(url, ())
        check_object_url(parts, options)
        self._scheme, self._options, self._deadline_s = parts.scheme, options, deadline_s
        self._place = parts.place if parts.scheme == "memory" else parts.place.rstrip("/")
        self._base = f"{parts.scheme}://{self._place}"
        self.url = shown_url(self._base, deadline_s, asdict(options))
        self._directory: ObjectDirectory | None = None
        self._hurried: Any
        self._patient: Any

    def explain(self, error: Exception) -> Explained:
        """What one of `faults` means."""
        return explain(error, store=self.url, scheme=self._scheme)

    def open(self) -> None:
        """Connect, and refuse another format; a store that has none yet gets it with the first thing written."""
        if self._scheme == "file":
            self._directory = ObjectDirectory(Path(unquote(self._place)), marker=_FORMAT_NAME)
            self._hurried = self._patient = LocalStore(self._directory.root)
        else:
            self._hurried, self._patient = connect(self._base, self._scheme, self._options, self._deadline_s)
        self._formatted = self._has_format()

    def fetch(self, key: str, *, patient: bool) -> memoryview | None:
        """A block, or None."""
        return self.read(_block_name(key), patient=patient)

    def put(self, key: str, data: memoryview, *, damaged: bool) -> None:
        """Write a block; one that is there stays if it is the same, and is not known to be damaged."""
        name = _block_name(key)
        # Bytes that are no encoded block carry no checksum by which one could be told from another.
        identity = None if damaged else _identity(data)
        if identity is None or not (self._create(name, data) or self._same(key, data, identity)):
            self.overwrite(name, data)

    def contains(self, keys: Sequence[str], *, patient: bool) -> list[str]:
        """Those that are there, one small request for each."""
        there = []
        for key in keys:
            with suppress(FileNotFoundError):
                obstore.head(self._client(patient), self._safe(_block_name(key)))
                there.append(key)
        return there

    def delete(self, keys: Sequence[str]) -> int:
        """Remove blocks; whether they were there is not known, and not asked."""
        names = [self._safe(_block_name(key)) for key in keys]
        try:
            obstore.delete(self._patient, names)
        except FileNotFoundError:
            # Somebody else was faster with one of them; where that is an error, the others may be there still.
            for name in names:
                with suppress(FileNotFoundError):
                    obstore.delete(self._patient, name)
        return len(names)

    def keys(self) -> Iterator[str]:
        """The keys of all blocks."""
        return (key for name, _ in self.listed("blocks") if (key := key_of(name)) is not None)

    def remember_fingerprint(self, digest: str, text: bytes) -> None:
        """Keep a fingerprint's text; it says the same whoever writes it."""
        self._create(f"fingerprints/{digest}.json", text)

    def fingerprints(self) -> Iterator[tuple[str, bytes]]:
        """Digests and texts."""
        for name, _ in self.listed("fingerprints"):
            match = _FINGERPRINT_NAME.fullmatch(name)
            if match is not None and (text := self.read(name)) is not None:
                yield match[1], bytes(text)

    def close(self) -> None:
        """Nothing: obstore's clients end with their last user."""

    def listed(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Names and sizes of the objects below a prefix, listed by the thousand."""
        for portion in obstore.list(self._patient, prefix=prefix, chunk_size=_LISTED_AT_ONCE):
            for entry in portion:
                yield entry["path"], entry["size"]

    def read(self, name: str, *, patient: bool = True) -> memoryview | None:
        """An object, or None."""
        try:
            return memoryview(obstore.get(self._client(patient), self._safe(name)).bytes())
        except FileNotFoundError:
            return None

    def head(self, key: str, nbytes: int) -> tuple[int, memoryview]:
        """A block's size and its first bytes, by one request; FileNotFoundError where it is gone."""
        found = obstore.get(self._patient, self._safe(_block_name(key)), options={"range": (0, nbytes)})
        return found.meta["size"], memoryview(found.bytes())

    def overwrite(self, name: str, data: memoryview) -> None:
        """Write an object, whatever is there."""
        self._ensure_format()
        self._write(name, data)

    def _client(self, patient: bool) -> Any:
        return self._patient if patient else self._hurried

    def _has_format(self) -> bool:
        """Whether the store has this format, or else none."""
        text = self.read(_FORMAT_NAME)
        if text is None:
            return False
        try:
            found = json.loads(bytes(text))["format"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise StoreError(f"{self.url}/{_FORMAT_NAME} is not a block store's: use another prefix") from None
        if found != _FORMAT:
            message = f"the store {self.url} has format {found!r:.20}, this release reads {_FORMAT}"
            raise StoreError(f"{message}; upgrade blockrag, or use another prefix")
        return True

    def _ensure_format(self) -> None:
        if not self._formatted and not self._has_format():
            self._write_new(_FORMAT_NAME, json.dumps({"format": _FORMAT}).encode() + b"\n")
        # Who was faster may be another release.
        self._formatted = self._formatted or self._has_format()

    def _create(self, name: str, data: bytes | memoryview) -> bool:
        """Write an object unless there is one; whether there was none."""
        self._ensure_format()
        return self._write_new(name, data)

    def _write_new(self, name: str, data: bytes | memoryview) -> bool:
        try:
            self._write(name, data, mode="create", use_multipart=False)
        except AlreadyExistsError:
            return False
        except (NotSupportedError, NotImplementedError):
            # A server that cannot create conditionally. Who was faster wrote the same.
            self._write(name, data)
        return True

    def _write(self, name: str, data: bytes | memoryview, **options: Any) -> None:
        # obstore's memory keeps the caller's buffer instead of a copy.
        obstore.put(self._patient, self._safe(name), bytes(data) if self._scheme == "memory" else data, **options)
        if self._directory is not None:
            self._directory.tighten(name)

    def _same(self, key: str, data: memoryview, identity: int) -> bool:
        """Whether a block has the size of `data` and begins with the same `identity` bytes, checksum included."""
        try:
            size, head = self.head(key, identity)
        except FAULTS:
            return False
        return size == len(data) and head == data[:identity]

    def _safe(self, name: str) -> str:
        """The name, if it leads to nothing but an object of this store."""
        if self._directory is not None:
            self._directory.check(name)
        return name


def key_of(name: str) -> str | None:
    """The key of the block that has this name; None if it is no block's."""
    match = _BLOCK_NAME.fullmatch(name)
    return None if match is None else match[1] + match[2]


def _block_name(key: str) -> str:
    return f"blocks/{key[:2]}/{key[2:]}"


def _identity(data: memoryview) -> int | None:
    """How many bytes at the beginning tell an encoded block from every other; None where it is none."""
    try:
        return codec.read_header(data).payload_offset
    except DamagedBlockError:
        return None
