"""The same blocks in every store that is compared: computed once, then copied.

Stores given by URL may hold other blocks already; those stay, and what a run put there is taken out again.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from blockrag.evaluation.speed.machine import filesystem_of
from blockrag.stores import DiskStore, MemoryStore, open_store

if TYPE_CHECKING:
    from blockrag.model.block_model import BlockModel
    from blockrag.prompt import Block
    from blockrag.stores.protocol import BlockStore

__all__ = ["ComparedStores"]

_IN_MEMORY = ("tmpfs", "ramfs")


@dataclass(frozen=True, slots=True)
class ComparedStores:
    """Where the passages lie.

    Args:
        memory: In this process.
        disk: In a temporary directory.
        directory: That directory.
        fills_disk: Whether the directory is wanted at all: long prompts of large models are gigabytes.
        others: Stores by URL, by the name of their mode: the scheme, and a number from the second one on.
    """

    memory: MemoryStore
    disk: DiskStore
    directory: Path
    fills_disk: bool
    others: dict[str, BlockStore]
    _added: dict[str, set[str]] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def opened(cls, urls: Sequence[str], *, fills_disk: bool) -> Iterator[ComparedStores]:
        """Open them all; afterwards the temporary ones are gone and the given ones hold what they held before.

        Args:
            urls: Stores beside memory and directory.
            fills_disk: Whether `fill` puts blocks into the directory.

        Raises:
            InputError: A URL names no store.
            StoreError: A store cannot be used.
        """
        with ExitStack() as stack:
            others: dict[str, BlockStore] = {}
            for url in urls:
                scheme = url.partition("://")[0]
                number = 1 + sum(name.split()[0] == scheme for name in others)
                name = scheme if number == 1 else f"{scheme} {number}"
                others[name] = stack.enter_context(closing(open_store(url)))
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blockrag-bench-")))
            memory = stack.enter_context(closing(MemoryStore()))
            disk = stack.enter_context(closing(DiskStore(directory)))
            named = {f"store {name}": store for name, store in others.items()}
            stores = cls(memory, disk, directory, fills_disk, named)
            stack.callback(stores._take_out)
            yield stores

    @property
    def filesystem(self) -> str | None:
        """The type of the file system that the directory is on, where the system says it."""
        return filesystem_of(self.directory)

    def warning(self) -> str | None:
        """What to say when the directory is not on a disk."""
        if not self.fills_disk or self.filesystem not in _IN_MEMORY:
            return None
        return f"temporary files are on {self.filesystem}, which is memory; set TMPDIR to a directory on a disk"

    def fill(self, model: BlockModel, blocks: Sequence[Block]) -> int:
        """Put blocks into all stores, computing only those that no shorter prompt had.

        Returns:
            Their bytes at rest.
        """
        model.materialize(blocks, self.memory)
        keys = {model.block_key(block.token_ids) for block in blocks}
        wanted: dict[str, BlockStore] = {"": self.disk} if self.fills_disk else {}
        for name, store in {**wanted, **self.others}.items():
            missing = keys - store.contains_many(keys)
            for key, data in self.memory.get_many(sorted(missing)):
                if data is not None:
                    store.put(key, data)
            self._added.setdefault(name, set()).update(missing)
        if wanted:
            # Written back now, so that pages can be dropped later and no write disturbs a measurement.
            os.sync()
        return sum(len(data) for _, data in self.memory.get_many(sorted(keys)) if data is not None)

    def _take_out(self) -> None:
        for name, store in self.others.items():
            store.delete_many(self._added.get(name, ()))
