"""`ObjectStore`: encoded blocks in a bucket, or in a directory laid out like one, shared by many machines.

What lies where is `blockrag.stores.object_server`'s business, what every store behind a network does is
`blockrag.stores.remote_store`'s. Here is what only a bucket has: a list of its blocks, `manifest.jsonl` (see
`blockrag.stores.manifest`), written on request, and things that no store put there.

Objects are written once: a block is created, not replaced, and where somebody else was faster and the block there is
the same, that is success. Nobody needs a lock, and writing a block twice is harmless. Only a copy that is another, or
that was found damaged, is overwritten. Nothing is evicted: the bucket's lifecycle rules do that.

A directory (`file:///path`) is for a file system that machines share, and for tests; `DiskStore` is faster, keeps a
budget and evicts. See `blockrag.stores.object_directory` for who may do what there.

Credentials come from the environment and from the machine's role, as obstore finds them, never from the URL.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from blockrag import codec
from blockrag.errors import DamagedBlockError
from blockrag.stores.manifest import ManifestEntry, read_manifest, write_manifest
from blockrag.stores.object_backend import ObjectOptions
from blockrag.stores.object_server import ObjectServer, key_of
from blockrag.stores.remote import DEFAULT_DEADLINE_S
from blockrag.stores.remote_store import RemoteStore
from blockrag.stores.report import Fault, merged

if TYPE_CHECKING:
    from blockrag.stores.report import StoreReport

__all__ = ["ObjectStore"]

_LOG = logging.getLogger(__name__)

_MANIFEST_NAME: Final = "manifest.jsonl"


class ObjectStore(RemoteStore):
    """A bucket, or a directory, of encoded blocks. Implements `BlockStore`, see `RemoteStore`.

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
        self._objects = ObjectServer(url, deadline_s, ObjectOptions(endpoint, region, allow_http))
        super().__init__(self._objects, deadline_s)

    def write_manifest(self) -> int:
        """List the blocks with their bytes, fingerprints and checksums in one object, `manifest.jsonl`, written last.

        Of each block only the header is read. A block whose header is none is left out and logged.

        Returns:
            The number of blocks in it.

        Raises:
            StoreError: The store cannot be listed, read or written, or it is closed.
        """
        sizes = {key: size for name, size in self._listed_blocks() if (key := key_of(name)) is not None}
        labels = self._remote.write_each(self._label, sizes.items())
        entries = sorted(entry for entry in labels if entry is not None)
        text = memoryview(write_manifest(entries))
        self._remote.write(lambda: self._objects.overwrite(_MANIFEST_NAME, text))
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
        report = super().verify(fix=fix)
        # Before what it names is looked for, so that it names nothing newer.
        with self._explained():
            manifest = self._objects.read(_MANIFEST_NAME)
        keys = {name: key_of(name) for name, _ in self._listed_blocks()}
        faults = [
            Fault("foreign", name, "has no block's name; remove it by hand")
            for name, key in keys.items()
            if key is None
        ]
        named = [] if manifest is None else _manifest_faults(manifest, set(keys.values()))
        if named and fix:
            self.write_manifest()
        return merged(report, [*faults, *(replace(fault, fixed=fix) for fault in named)])

    def _listed_blocks(self) -> list[tuple[str, int]]:
        self._remote.check_open()
        with self._explained():
            return list(self._objects.listed("blocks"))

    def _label(self, block: tuple[str, int]) -> ManifestEntry | None:
        """What the manifest says of a block of this key and size; None where it is gone, or none."""
        key, size = block
        try:
            # obstore fails where an object is empty.
            found = codec.read_label(self._objects.head(key, codec.LABEL_BYTES)[1] if size else memoryview(b""))
        except FileNotFoundError:
            return None
        except DamagedBlockError as error:
            _LOG.warning("%s: block %s... is left out of the manifest: %s", self.url, key[:12], error)
            return None
        return ManifestEntry(key, size, found.fingerprint, found.checksum)


def _manifest_faults(manifest: memoryview, there: set[str | None]) -> list[Fault]:
    try:
        missing = {entry.key for entry in read_manifest(manifest)} - there
    except DamagedBlockError as error:
        return [Fault("damaged", _MANIFEST_NAME, str(error))]
    return [Fault("missing", key, f"{_MANIFEST_NAME} names it") for key in sorted(missing)]
