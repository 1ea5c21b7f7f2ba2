"""Where blocks would go: how much room is there, what is there already, and a place beside it to measure in.

A directory is measured in a temporary one beside it, on the same file system. A bucket or a server is measured in
itself: it is given a few of the very blocks that it would be given anyhow, and those that it did not have are taken out
again. Of a tiered store the last tier is what must hold everything, and what is measured.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from blockrag.errors import StoreError
from blockrag.stores import DiskStore, MemoryStore, open_store, read_store_url

if TYPE_CHECKING:
    from blockrag.stores.protocol import BlockStore

__all__ = ["Target", "available_memory"]

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Target:
    """A store that blocks would go to.

    Args:
        url: In the form that `open_store` takes; of a tiered store, its last tier's.
        name: The URL as it may be shown.
        directory: Of a local store, whether it is there yet or not; else None.
        max_bytes: Its byte budget; None where it has none.
    """

    url: str
    name: str
    directory: Path | None = None
    max_bytes: int | None = None

    @classmethod
    def at(cls, url: str) -> Target:
        """The store a URL names; it need not be there yet.

        Raises:
            InputError: No store has such a URL.
        """
        *caches, parts = read_store_url(url)
        own = url.rpartition("|")[2] if caches else url
        directory = Path(unquote(parts.place)).expanduser() if parts.scheme in ("disk", "file") else None
        return cls(own, parts.text, directory, parts.size("max_bytes"))

    @classmethod
    def in_directory(cls, directory: Path, max_bytes: int | None = None) -> Target:
        """The block store of a directory, which need not be there yet."""
        url = f"disk://{quote(str(directory))}"
        return cls(url, url, directory, max_bytes)

    @property
    def scheme(self) -> str:
        """What kind of store it is, such as "disk"."""
        return self.url.partition("://")[0]

    @property
    def where(self) -> str:
        """The place that must have room, in words."""
        if self.directory is not None:
            return str(_existing(self.directory))
        return "memory" if self.scheme == "memory" else self.name

    def free_bytes(self) -> int | None:
        """Room for blocks, as far as it can be told: of a bucket or a server it cannot."""
        if self.directory is not None:
            return shutil.disk_usage(_existing(self.directory)).free
        return available_memory() if self.scheme == "memory" else None

    @contextmanager
    def existing_store(self) -> Iterator[BlockStore | None]:
        """The store, if there is one; nothing is made.

        Raises:
            StoreError: There is one that cannot be used.
        """
        if self.scheme == "memory" or (self.directory is not None and not self.directory.is_dir()):
            yield None
            return
        with closing(open_store(self.url)) as store:
            yield store

    @contextmanager
    def scratch_store(self) -> Iterator[BlockStore]:
        """A store to measure in: a temporary one of the same kind, or where there is no such thing, the store itself.

        Whoever puts blocks into it takes out again what was not there before.

        Raises:
            StoreError: The place cannot be written, or the store cannot be used.
        """
        if self.scheme == "memory":
            with closing(MemoryStore()) as memory:
                yield memory
        elif self.scheme == "disk" and self.directory is not None:
            with _beside(self.directory) as directory, closing(DiskStore(directory)) as disk:
                yield disk
        else:
            with closing(open_store(self.url)) as store:
                yield store


@contextmanager
def _beside(directory: Path) -> Iterator[Path]:
    parent = _existing(directory.parent)
    try:
        made = tempfile.TemporaryDirectory(prefix=".blockrag-plan-", dir=parent)
    except OSError as error:
        raise StoreError(f"{parent} cannot be written ({error.strerror}); pass a place that can") from error
    with made as name:
        yield Path(name)


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it that is there."""
    resolved = path.resolve()
    return next((one for one in (resolved, *resolved.parents) if one.is_dir()), resolved)


def available_memory() -> int | None:
    """Bytes that programs may take before the machine, or its control group, runs short; None where nobody says.

    Source: proc(5), MemAvailable; the kernel's cgroup-v2 documentation, memory.max and memory.current.
    """
    try:
        lines = _MEMINFO.read_text("utf-8").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
    try:
        limit, used = ((_CGROUP / name).read_text("utf-8").strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return min(free, max(0, int(limit) - int(used))) if limit.isdigit() else free
