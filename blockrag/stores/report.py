"""What a check of a store found, and the part of the check that is the same for every store.

Every block is read, its checksum verified, and its header compared with the key it lies under. What else a store keeps
(files, an index, totals) is for the store itself to check, which adds its faults to the report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Literal, TypeAlias

from blockrag import codec
from blockrag.errors import DamagedBlockError

if TYPE_CHECKING:
    from blockrag.stores.protocol import BlockStore

__all__ = ["Fault", "FaultKind", "StoreReport", "check_blocks", "merged"]

FaultKind: TypeAlias = Literal["damaged", "missing", "stray", "foreign", "totals", "exposed", "unreadable"]
"""damaged: bytes that are not the block of their key. missing: named, but not there. stray: belongs to nothing.
foreign: something blockrag never writes. totals: counters that disagree with the contents. exposed: others than the
owner may read or write it. unreadable: an error of the medium or the network."""

_KEYS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong.

    Args:
        kind: See `FaultKind`.
        where: The block's key, or the file's name within the store.
        message: What is wrong with it.
        fixed: Whether it was mended.
    """

    kind: FaultKind
    where: str
    message: str
    fixed: bool = False


@dataclass(frozen=True, slots=True)
class StoreReport:
    """The result of `BlockStore.verify`.

    Args:
        url: The store.
        blocks: Sound blocks.
        bytes: Their bytes.
        fingerprints: How many of them each fingerprint's digest has.
        faults: What is wrong.
    """

    url: str
    blocks: int
    bytes: int
    fingerprints: Mapping[str, int] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong any more."""
        return all(fault.fixed for fault in self.faults)


def check_blocks(store: BlockStore, *, fix: bool, on_block: Callable[[int], None] | None = None) -> StoreReport:
    """Read and check every block of a store.

    Args:
        store: The store; blocks written while it is checked may or may not be seen.
        fix: Delete the blocks that are damaged or gone.
        on_block: Told the bytes of each block as it is checked.

    Raises:
        StoreError: The store cannot be read.
    """
    faults: list[Fault] = []
    owners: Counter[str] = Counter()
    blocks = total = 0

    def check(keys: Iterable[str]) -> list[str]:
        """Check some blocks, and return the keys of those that are gone."""
        nonlocal blocks, total
        gone: list[str] = []
        left = iter(keys)
        while portion := list(islice(left, _KEYS_AT_ONCE)):
            for key, data in store.get_many(portion):
                if data is None:
                    gone.append(key)
                    continue
                size = len(data)
                if on_block is not None:
                    on_block(size)
                try:
                    header = codec.read_header(data)
                except DamagedBlockError as error:
                    faults.append(_fault(store, "damaged", key, str(error), fix=fix))
                    continue
                if header.key != key:
                    faults.append(_fault(store, "damaged", key, f"holds block {header.key}", fix=fix))
                    continue
                owners[header.fingerprint] += 1
                blocks += 1
                total += size
        return gone

    # Somebody may have deleted a block since it was listed, and even written it again since; then nothing is wrong.
    if gone := check(list(store.keys())):
        gone = check(set(gone).intersection(store.keys()))
    for key in gone:
        faults.append(_fault(store, "missing", key, "its bytes are gone, short or unreadable", fix=fix))
    return StoreReport(store.url, blocks, total, dict(owners), tuple(faults))


def merged(report: StoreReport, faults: Iterable[Fault]) -> StoreReport:
    """The report with a store's own faults added."""
    return StoreReport(report.url, report.blocks, report.bytes, report.fingerprints, (*report.faults, *faults))


def _fault(store: BlockStore, kind: FaultKind, key: str, message: str, *, fix: bool) -> Fault:
    if fix:
        # Where somebody else has deleted it, nothing is wrong any more either.
        store.delete_many([key])
    return Fault(kind, key, message, fixed=fix)
