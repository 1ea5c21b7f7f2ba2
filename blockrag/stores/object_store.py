"""`ObjectStore`: encoded blocks in a bucket, or in a directory laid out like one, shared by many machines.

Through obstore (developmentseed.org/obstore), which treats S3, Google Cloud Storage, Azure and directories alike; only
this module knows it. Below the prefix of the URL lie

    format.json                     {"format": 1}, written before the first block; another version is refused by name
    blocks/ab/<62 hex digits>       the encoded block whose key begins with ab
    fingerprints/<32 hex digits>.json
    manifest.jsonl                  see `blockrag.stores.manifest`; written on request

Objects are written once: a block is created, not replaced, and where somebody else was faster and the block there is
the same, that is success. Nobody needs a lock, and writing a block twice is harmless. Only a copy that is another, or
that was found damaged, is overwritten. Nothing is evicted: the bucket's lifecycle rules do that.

A directory (`file:///path`) is for a file system that machines share, and for tests; `DiskStore` is faster, keeps a
budget and evicts. obstore writes a file beside its place and links it there, so that no reader sees half a block, but
it does not synchronise to the medium (a block lost to a power failure is a miss), and leaves the staging file of a
killed writer behind. See `blockrag.stores.object_directory` for who may do what there.

Credentials come from the environment and from the machine's role, as obstore finds them, never from the URL.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

import obstore
from obstore.exceptions import AlreadyExistsError, NotSupportedError
from obstore.store import LocalStore

from blockrag import codec
from blockrag.errors import DamagedBlockError, InputError, StoreError
from blockrag.fingerprint import Fingerprint, check_key
from blockrag.stores.manifest import ManifestEntry, read_manifest, write_manifest
from blockrag.stores.memory import byte_view
from blockrag.stores.object_backend import FAULTS, ObjectOptions, check_object_url, connect, explain
from blockrag.stores.object_directory import ObjectDirectory
from blockrag.stores.remote import DEFAULT_DEADLINE_S, PATIENT_S, Explained, Remote, examine
from blockrag.stores.report import Fault, StoreReport, merged
from blockrag.stores.urls import parse_store_url, with_parameters

if TYPE_CHECKING:
    from blockrag.stores.protocol import StoreStats

__all__ = ["ObjectStore"]

_LOG = logging.getLogger(__name__)

_FORMAT: Final = 1
_FORMAT_NAME: Final = "format.json"
_MANIFEST_NAME: Final = "manifest.jsonl"
_BLOCK_NAME: Final = re.compile(r"blocks/([0-9a-f]{2})/([0-9a-f]{62})")
_FINGERPRINT_NAME: Final = re.compile(r"fingerprints/([0-9a-f]{32})\.json")
_KEYS_AT_ONCE: Final = 1000


class ObjectStore:
    """A bucket, or a directory, of encoded blocks. Implements `BlockStore`; threads, processes, machines may share it.

    A process that was forked must open the store again.

    Args:
        url: `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`, `file:///absolute/path`, or
            `memory:///` (in this process, for tests), without parameters.
        deadline_s: Seconds that one call of `get` or `get_many` waits for the network altogether.
        endpoint: URL of a server that speaks S3 or Azure's protocol, e.g. MinIO's.
        region: The region of an S3 bucket.
        allow_http: Whether `endpoint` may be without TLS.

    Raises:
        InputError: A URL or option that cannot be used.
        StoreError: The bucket cannot be reached, the directory holds something else, or the format is unknown.
    """

    def __init__(
        self,
        url: str,
        *,
        deadline_s: float = DEFAULT_DEADLINE_S,
        endpoint: str | None = None,
        region: str | None = None,
        allow_http: bool = False,
    ) -> None:
        parts = parse_store_url(url, ())
        self._scheme = parts.scheme
        self._options = ObjectOptions(endpoint, region, allow_http)
        self._deadline_s = deadline_s
        check_object_url(parts, self._options)
        place = parts.place if parts.scheme == "memory" else parts.place.rstrip("/")
        self._base = f"{parts.scheme}://{place}"
        self._remote = self._traffic(deadline_s)
        self._directory: ObjectDirectory | None = None
        self._hurried: Any
        self._patient: Any
        if self._scheme == "file":
            self._directory = ObjectDirectory(Path(unquote(place)), marker=_FORMAT_NAME)
            self._hurried = self._patient = LocalStore(self._directory.root)
        else:
            self._hurried, self._patient = connect(self._base, self._scheme, self._options, deadline_s)
        self._formatted = self._read_format()

    @property
    def url(self) -> str:
        """Where the store is, with what it was opened with."""
        deadline = None if self._deadline_s == DEFAULT_DEADLINE_S else float(self._deadline_s)
        return with_parameters(self._base, {"deadline": deadline, **asdict(self._options)})

    def get(self, key: str) -> memoryview | None:
        """The encoded block over a fresh buffer, or None; what fails, is late or damaged counts as missing.

        Raises:
            InputError: A malformed key.
            UnsafeStoreError: The name leads out of the directory, or to something that is no file.
            StoreError: The store is closed.
        """
        return self._remote.get(key)

    def get_many(self, keys: Sequence[str]) -> Iterator[tuple[str, memoryview | None]]:
        """Each of the distinct `keys` with its block or None, in order; up to eight are read ahead, in parallel.

        Raises:
            InputError: A key comes twice or is malformed.
            UnsafeStoreError: A name leads out of the directory, or to something that is no file.
            StoreError: The store is closed.
        """
        return self._remote.get_many(keys)

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        """Store one encoded block, unless the same lies there already.

        Raises:
            InputError: A malformed key, or `data` is not bytes.
            StoreFullError: There is no room, or the bucket takes no object as large.
            StoreError: It could not be written, or the store is closed.
        """
        name = _block_name(check_key(key))
        view = byte_view(data)
        self._remote.counted_put(key, lambda suspect: self._put(name, view, replace=suspect))

    def contains_many(self, keys: Iterable[str]) -> set[str]:
        """The subset of `keys` that is stored, one small request for each; what fails counts as missing.

        Raises:
            InputError: A malformed key.
            StoreError: The store is closed.
        """
        return set(self._remote.ask_each(self._exists, {check_key(key) for key in keys}))

    def delete_many(self, keys: Iterable[str]) -> int:
        """Remove blocks; returns how many there were.

        Raises:
            InputError: A malformed key.
            StoreError: They could not be removed, or the store is closed.
        """
        found = iter(self.contains_many(keys))
        deleted = 0
        while portion := [_block_name(key) for key in islice(found, _KEYS_AT_ONCE)]:
            self._remote.write(partial(self._delete, portion))
            deleted += len(portion)
        return deleted

    def keys(self) -> Iterator[str]:
        """The stored keys, listed by the thousand.

        Raises:
            StoreError: They cannot be listed, or the store is closed.
        """
        self._remote.check_open()
        return (key for key, _ in self._blocks())

    def stats(self) -> StoreStats:
        """The traffic; blocks and bytes are None, for counting them would list the bucket.

        Raises:
            StoreError: The store is closed.
        """
        return self._remote.stats()

    def pinned(self, keys: Iterable[str]) -> AbstractContextManager[None]:
        """Does nothing: this store evicts nothing."""
        return nullcontext()

    def remember_fingerprint(self, fingerprint: Fingerprint) -> None:
        """Note that blocks of this fingerprint are written here.

        Raises:
            StoreError: It could not be written, or the store is closed.
        """
        text = fingerprint.to_json().encode()
        name = f"fingerprints/{fingerprint.digest}.json"

        def create() -> None:
            with suppress(AlreadyExistsError):
                self._create(name, text)

        self._remote.write(create)

    def fingerprints(self) -> dict[str, Fingerprint]:
        """The remembered fingerprints by digest; one that cannot be read is left out and logged.

        Raises:
            StoreError: They cannot be listed, or the store is closed.
        """
        self._remote.check_open()
        found: dict[str, Fingerprint] = {}
        for name, _ in self._list("fingerprints"):
            match = _FINGERPRINT_NAME.fullmatch(name)
            if match is None:
                continue
            try:
                fingerprint = Fingerprint.from_json(str(self._read(name), "utf-8"))
            except (StoreError, InputError, UnicodeDecodeError) as error:
                _LOG.warning("%s: %s cannot be read: %s", self.url, name, error)
                continue
            if fingerprint.digest == match[1]:
                found[fingerprint.digest] = fingerprint
            else:
                _LOG.warning("%s: %s holds fingerprint %s; delete it", self.url, name, fingerprint.digest)
        return found

    def write_manifest(self) -> int:
        """List the blocks with their bytes, fingerprints and checksums in one object, `manifest.jsonl`, written last.

        Of each block only the header is read. A block whose header cannot be read is left out and logged.

        Returns:
            The number of blocks in it.

        Raises:
            StoreError: The store cannot be listed or written, or it is closed.
        """
        self._remote.check_open()
        sizes = dict(self._blocks())
        entries: list[ManifestEntry] = []

        def label(key: str) -> bool:
            with suppress(FileNotFoundError):
                try:
                    found = codec.read_label(self._head(_block_name(key), codec.LABEL_BYTES)[1])
                except DamagedBlockError as error:
                    _LOG.warning("%s: block %s... is left out of the manifest: %s", self.url, key[:12], error)
                else:
                    entries.append(ManifestEntry(key, sizes[key], found.fingerprint, found.checksum))
                    return found.key == key
            return False

        self._remote.ask_each(label, sizes)
        entries.sort()
        text = memoryview(write_manifest(entries))
        self._remote.write(lambda: self._overwrite(_MANIFEST_NAME, text))
        return len(entries)

    def verify(self, *, fix: bool = False) -> StoreReport:
        """Read and check every block, and compare them with the manifest if there is one.

        A block that is named in it and not there is missing; one that it does not name was written later. Objects
        under `blocks/` that have no block's name are reported and left alone.

        Args:
            fix: Remove damaged blocks, and write the manifest anew where it names what is missing.

        Raises:
            StoreError: The store cannot be listed, or it is closed.
        """
        self._remote.check_open()
        examined = copy.copy(self)
        examined._hurried = self._patient
        examined._remote = examined._traffic(PATIENT_S, checked=False)
        try:
            report = examine(self, examined, fix=fix)
        finally:
            examined.close()
        foreign = [
            Fault("foreign", name, "has no block's name; remove it by hand")
            for name, _ in self._list("blocks")
            if _key_of(name) is None
        ]
        return merged(report, foreign + self._compared_with_manifest(fix=fix))

    def close(self) -> None:
        """Stop; closing twice is fine."""
        self._remote.close()

    def _traffic(self, deadline_s: float, *, checked: bool = True) -> Remote:
        return Remote(
            self.url, deadline_s=deadline_s, fetch=self._fetch, faults=FAULTS, explain=self._explained, checked=checked
        )

    def _fetch(self, key: str) -> memoryview | None:
        name = _block_name(key)
        self._check_path(name)
        try:
            return memoryview(obstore.get(self._hurried, name).bytes())
        except FileNotFoundError:
            return None

    def _exists(self, key: str) -> bool:
        name = _block_name(key)
        self._check_path(name)
        try:
            obstore.head(self._hurried, name)
        except FileNotFoundError:
            return False
        return True

    def _put(self, name: str, data: memoryview, *, replace: bool) -> None:
        """Write a block; one that is there stays if it is the same."""
        # Bytes that are no encoded block carry no checksum by which one could be told from another.
        identity = None if replace else _identity(data)
        if identity is None:
            self._overwrite(name, data)
            return
        try:
            self._create(name, data)
        except (NotSupportedError, NotImplementedError):
            # A server that cannot create conditionally. Who was faster wrote the same.
            self._overwrite(name, data)
        except AlreadyExistsError:
            if not self._same(name, data, identity):
                self._overwrite(name, data)

    def _create(self, name: str, data: bytes | memoryview) -> None:
        self._ensure_format()
        self._write(name, data, mode="create", use_multipart=False)

    def _overwrite(self, name: str, data: memoryview) -> None:
        self._ensure_format()
        self._write(name, data)

    def _write(self, name: str, data: bytes | memoryview, **options: Any) -> None:
        self._check_path(name)
        # obstore's memory keeps the caller's buffer instead of a copy.
        obstore.put(self._patient, name, bytes(data) if self._scheme == "memory" else data, **options)
        self._tighten(name)

    def _same(self, name: str, data: memoryview, identity: int) -> bool:
        """Whether an object has the size of `data` and begins with the same `identity` bytes, checksum included."""
        try:
            size, head = self._head(name, identity)
        except FAULTS:
            return False
        return size == len(data) and head == data[:identity]

    def _head(self, name: str, nbytes: int) -> tuple[int, memoryview]:
        """An object's size and its first bytes, by one request."""
        self._check_path(name)
        found = obstore.get(self._patient, name, options={"range": (0, nbytes)})
        return found.meta["size"], memoryview(found.bytes())

    def _delete(self, names: list[str]) -> None:
        for name in names:
            self._check_path(name)
        try:
            obstore.delete(self._patient, names)
        except FileNotFoundError:
            # Somebody else was faster with one of them; where that is an error, the others may be there still.
            for name in names:
                with suppress(FileNotFoundError):
                    obstore.delete(self._patient, name)

    def _read(self, name: str) -> memoryview:
        try:
            self._check_path(name)
            return memoryview(obstore.get(self._patient, name).bytes())
        except FAULTS as error:
            raise self._explained(error).error from error

    def _blocks(self) -> Iterator[tuple[str, int]]:
        for name, size in self._list("blocks"):
            if (key := _key_of(name)) is not None:
                yield key, size

    def _list(self, prefix: str) -> Iterator[tuple[str, int]]:
        try:
            for portion in obstore.list(self._patient, prefix=prefix, chunk_size=_KEYS_AT_ONCE):
                for entry in portion:
                    yield entry["path"], entry["size"]
        except FAULTS as error:
            raise self._explained(error).error from error

    def _read_format(self) -> bool:
        """Whether the store has its format already, once it is known to be this one."""
        try:
            self._check_path(_FORMAT_NAME)
            text = bytes(obstore.get(self._patient, _FORMAT_NAME).bytes())
        except FileNotFoundError:
            return False
        except FAULTS as error:
            raise self._explained(error).error from error
        try:
            found = json.loads(text)["format"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise StoreError(f"{self.url}/{_FORMAT_NAME} is not a block store's: use another prefix") from None
        if found != _FORMAT:
            message = f"the store {self.url} has format {found!r:.20}, this release reads {_FORMAT}"
            raise StoreError(f"{message}; upgrade blockrag, or use another prefix")
        return True

    def _ensure_format(self) -> None:
        if self._formatted:
            return
        text = json.dumps({"format": _FORMAT}).encode() + b"\n"
        with suppress(AlreadyExistsError):
            self._write(_FORMAT_NAME, text, mode="create", use_multipart=False)
        self._formatted = self._read_format()

    def _compared_with_manifest(self, *, fix: bool) -> list[Fault]:
        try:
            text = self._read(_MANIFEST_NAME)
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return []
            raise
        try:
            named = read_manifest(text)
        except DamagedBlockError as error:
            return [Fault("damaged", _MANIFEST_NAME, str(error), fixed=fix and self.write_manifest() >= 0)]
        missing = sorted({entry.key for entry in named}.difference(self.keys()))
        fixed = fix and bool(missing) and self.write_manifest() >= 0
        return [Fault("missing", key, f"{_MANIFEST_NAME} names it", fixed=fixed) for key in missing]

    def _check_path(self, name: str) -> None:
        if self._directory is not None:
            self._directory.check(name)

    def _tighten(self, name: str) -> None:
        if self._directory is not None:
            self._directory.tighten(name)

    def _explained(self, error: Exception) -> Explained:
        return explain(error, store=self.url, scheme=self._scheme)


def _identity(data: memoryview) -> int | None:
    """How many bytes at the beginning tell an encoded block from every other; None where it is none."""
    try:
        return codec.read_header(data).payload_offset
    except DamagedBlockError:
        return None


def _block_name(key: str) -> str:
    return f"blocks/{key[:2]}/{key[2:]}"


def _key_of(name: str) -> str | None:
    match = _BLOCK_NAME.fullmatch(name)
    return None if match is None else match[1] + match[2]
