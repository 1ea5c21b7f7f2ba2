"""The fingerprints that wrote into a store: one small file each, `fingerprints/<digest>.json`.

What is read is judged: a regular file of a bounded size whose content has the digest that its name says. Anything else
is left out and logged, and written anew when the fingerprint is remembered again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
from collections.abc import Iterator
from typing import Final

from blockrag.errors import InputError, UnsafeStoreError
from blockrag.fingerprint import Fingerprint
from blockrag.stores.disk.directory import FINGERPRINTS, create, only_writer
from blockrag.stores.files import StoreFiles

__all__ = ["FingerprintFiles"]

_LOG = logging.getLogger(__name__)

_NAME: Final = re.compile(r"([0-9a-f]{32})\.json")
_UNFINISHED: Final = re.compile(r"[0-9a-f]{32}\.json\.[0-9a-f]{16}")
_MAX_BYTES: Final = 16384
_READ: Final = os.O_RDONLY | os.O_NONBLOCK


class FingerprintFiles:
    """The `fingerprints` directory of one store.

    Args:
        root: The store's directory.
        files: The calls that may fail.
    """

    def __init__(self, root: str, files: StoreFiles) -> None:
        self._root = root
        self._directory = f"{root}/{FINGERPRINTS}"
        self._files = files
        self._remembered: set[str] = set()

    def remember(self, fingerprint: Fingerprint) -> None:
        """Write it down unless it is there.

        Raises:
            OSError: It cannot be written.
            StoreError: Another process keeps the writers' lock.
            UnsafeStoreError: The directory is none, or a link.
        """
        digest = fingerprint.digest
        if digest in self._remembered:
            return
        self._files.make_directory(self._directory)
        self._check_directory()
        name = f"{digest}.json"
        if self._fault(name) is not None:
            unfinished = f"{self._directory}/{name}.{os.urandom(8).hex()}"
            try:
                create(unfinished, fingerprint.to_json().encode(), self._files)
                with only_writer(self._root, self._files):
                    self._files.rename(unfinished, f"{self._directory}/{name}")
            except BaseException:
                with contextlib.suppress(OSError):
                    self._files.remove(unfinished)
                raise
        self._remembered.add(digest)

    def read(self) -> dict[str, Fingerprint]:
        """The remembered ones by digest; one that cannot be used is left out and logged.

        Raises:
            OSError: The directory cannot be read.
            UnsafeStoreError: It is none, or a link.
        """
        found: dict[str, Fingerprint] = {}
        for name in self._names():
            if match := _NAME.fullmatch(name):
                loaded = self._load(name)
                if isinstance(loaded, Fingerprint):
                    found[match[1]] = loaded
                else:
                    _LOG.warning("%s/%s %s; it is left out", self._directory, name, loaded)
        return found

    def faults(self) -> Iterator[tuple[str, str]]:
        """(file name within the store, what is wrong with it) of each file that `read` leaves out."""
        for name in self._names():
            if _NAME.fullmatch(name) and (fault := self._fault(name)) is not None and self._exists(name):
                yield f"{FINGERPRINTS}/{name}", fault

    def unfinished(self, before: float) -> Iterator[str]:
        """Names within the store of what killed writers left, last written before a point in time."""
        for name in self._names():
            with contextlib.suppress(FileNotFoundError):
                path = f"{self._directory}/{name}"
                if _UNFINISHED.fullmatch(name) and self._files.status_of(path).st_mtime < before:
                    yield f"{FINGERPRINTS}/{name}"

    def remove(self, name: str) -> None:
        """Remove what `unfinished` named, unless somebody else has."""
        with contextlib.suppress(FileNotFoundError):
            self._files.remove(f"{self._directory}/{name.removeprefix(FINGERPRINTS + '/')}")

    def remove_faulty(self, name: str) -> None:
        """Remove what `faults` named, unless it is sound by now; it is written again when it is remembered again.

        Raises:
            OSError: It cannot be removed.
            StoreError: Another process keeps the writers' lock.
        """
        file = name.removeprefix(f"{FINGERPRINTS}/")
        self._remembered.discard(file.removesuffix(".json"))
        with only_writer(self._root, self._files):
            if self._fault(file) is not None:
                self.remove(name)

    def foreign(self) -> Iterator[str]:
        """Names within the store of what is not from here."""
        for name in self._names():
            if not _NAME.fullmatch(name) and not _UNFINISHED.fullmatch(name):
                yield f"{FINGERPRINTS}/{name}"

    def _names(self) -> list[str]:
        try:
            self._check_directory()
            return sorted(self._files.names(self._directory))
        except FileNotFoundError:
            return []

    def _exists(self, name: str) -> bool:
        try:
            self._files.status_of(f"{self._directory}/{name}")
        except FileNotFoundError:
            return False
        return True

    def _check_directory(self) -> None:
        if not stat.S_ISDIR(self._files.status_of(self._directory).st_mode):
            raise UnsafeStoreError(f"{self._directory} is not a directory; do not trust this store, delete it")

    def _fault(self, name: str) -> str | None:
        loaded = self._load(name)
        return loaded if isinstance(loaded, str) else None

    def _load(self, name: str) -> Fingerprint | str:
        """The fingerprint in a file, or what is wrong with it."""
        try:
            handle = self._files.open(f"{self._directory}/{name}", _READ)
        except OSError as error:
            return f"cannot be opened ({error})"
        try:
            status = self._files.status(handle)
            if not stat.S_ISREG(status.st_mode):
                return "is not a regular file"
            if status.st_size > _MAX_BYTES:
                return f"has {status.st_size} bytes, more than a fingerprint takes"
            buffer = bytearray(status.st_size)
            if self._files.read_into(handle, memoryview(buffer), 0) != len(buffer):
                return "ends early"
            fingerprint = Fingerprint.from_json(buffer.decode())
        except OSError as error:
            return f"cannot be read ({error})"
        except (InputError, UnicodeDecodeError) as error:
            return f"holds no fingerprint ({error})"
        finally:
            os.close(handle)
        if f"{fingerprint.digest}.json" != name:
            return f"holds fingerprint {fingerprint.digest}"
        return fingerprint
