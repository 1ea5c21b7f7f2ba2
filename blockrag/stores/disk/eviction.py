"""What goes when a byte budget is spent: the least recently used blocks that nobody has pinned, as few as it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockrag.errors import StoreFullError, UnsafeStoreError

if TYPE_CHECKING:
    from blockrag.stores.disk.index import Discard, Index
    from blockrag.stores.pins import Pins

__all__ = ["make_room"]


def make_room(index: Index, discard: Discard, key: str, size: int, *, max_bytes: int, pins: Pins) -> int:
    """Evict just enough for `size` bytes more under `key`, within a write transaction.

    Args:
        index: The rows.
        discard: Takes the files of what is evicted.
        key: The block that will be stored, whose row is about to be replaced; "" for none.
        size: Its bytes.
        max_bytes: The budget.
        pins: What must stay.

    Returns:
        How many blocks were evicted.

    Raises:
        StoreFullError: It finds no room beside the pinned ones; nothing was evicted.
        UnsafeStoreError: A row has a size that is none.
    """
    ((replaced,),) = index.fetch("SELECT COALESCE(SUM(size), 0) FROM Cache WHERE key = ?", (key,))
    excess = index.total("size") - replaced + size - max_bytes
    if excess <= 0:
        return 0
    victims: list[tuple[int, str | None]] = []
    kept = 0
    query = "SELECT rowid, key, size, filename FROM Cache WHERE key != ? ORDER BY access_time"
    for rowid, other, freed, filename in index.execute(query, (key,)):
        if type(freed) is not int or freed < 0:
            raise UnsafeStoreError(f"the store holds a row of {freed!r:.20} bytes; delete the directory")
        if other in pins:
            kept += freed
            continue
        victims.append((rowid, filename))
        excess -= freed
        if excess <= 0:
            break
    # Should the total have been wrong, everything else is evicted and the block fits.
    if excess > 0 and kept + size > max_bytes:
        raise StoreFullError(
            f"a block of {size} bytes finds no room in max_bytes={max_bytes} beside the blocks that running prompts "
            "use; raise max_bytes"
        )
    index.drop(victims, discard)
    return len(victims)
