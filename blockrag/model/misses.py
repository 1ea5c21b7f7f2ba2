"""Why blocks are missing: what a store was last written for, against the model that asks now.

Every store remembers the fingerprints that wrote into it. Where blocks are missing and the store knows others but not
this model, something has changed (another revision, an adapter, an upgrade), and it says what; once per store, because
all of its blocks will miss. Fingerprints name no tenant, and blocks are only looked for in the model's own namespace.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakSet

from blockrag.errors import StoreError, UnsafeStoreError

if TYPE_CHECKING:
    from blockrag.fingerprint import FactorChange, Fingerprint
    from blockrag.stores.protocol import BlockStore

__all__ = ["KeyUnder", "MissExplanation", "MissNotes"]

logger = logging.getLogger(__name__)

# More is no change of one model, but another one.
_MOST_IN_FULL = 3

KeyUnder = Callable[[Sequence[int], str], str]
"""The key that a block's token ids have under the digest of another fingerprint."""


@dataclass(frozen=True, slots=True)
class MissExplanation:
    """What a store was written for, where that is not the model that asks.

    Args:
        fingerprint: Digest of the stored fingerprint that is nearest to the model's.
        changes: In what they differ.
        asked: Blocks that were asked for.
        stored: How many of them are stored under that fingerprint.
    """

    fingerprint: str
    changes: tuple[FactorChange, ...]
    asked: int = 0
    stored: int = 0

    def __str__(self) -> str:
        if len(self.changes) <= _MOST_IN_FULL:
            reasons = "; ".join(map(str, self.changes))
        else:
            reasons = f"another model's, for {', '.join(change.name for change in self.changes)} differ"
        found = f"; {self.stored} of the {self.asked} missing blocks are stored under it" if self.stored else ""
        return (
            f"the store's blocks were computed under another fingerprint, {self.fingerprint[:8]}...: {reasons}{found}"
        )


@dataclass(slots=True)
class MissNotes:
    """What one model knows of the stores it has used.

    Args:
        fingerprint: The model's.
    """

    fingerprint: Fingerprint
    _explained: WeakSet[BlockStore] = field(default_factory=WeakSet)
    _remembered: WeakSet[BlockStore] = field(default_factory=WeakSet)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def explain(
        self, store: BlockStore, key_under: KeyUnder, blocks: Sequence[Sequence[int]] = ()
    ) -> MissExplanation | None:
        """Why blocks may be missing from a store.

        Args:
            store: The store.
            key_under: Names a block under another fingerprint.
            blocks: Token ids of the blocks that are missing.

        Returns:
            What changed since the store was written; None if it knows this model, or nobody.

        Raises:
            StoreError: The store cannot be read.
        """
        known = store.fingerprints()
        if not known or self.fingerprint.digest in known:
            return None
        digest, nearest = min(known.items(), key=lambda one: (len(self.fingerprint.differences(one[1])), one[0]))
        stored = store.contains_many(key_under(token_ids, digest) for token_ids in blocks)
        return MissExplanation(digest, self.fingerprint.changes_since(nearest), len(blocks), len(stored))

    def missed(self, store: BlockStore, key_under: KeyUnder, blocks: Sequence[Sequence[int]]) -> None:
        """Say, the first time that blocks are missing from a store that can be asked, why all of this model's are."""
        if not self._first(self._explained, store):
            return
        try:
            explanation = self.explain(store, key_under, blocks)
        except UnsafeStoreError:
            raise
        except StoreError as error:
            logger.info(
                "nobody knows why blocks are missing, for the store cannot say what it was written for: %s", error
            )
            with self._lock:
                # It may be able to the next time.
                self._explained.discard(store)
            return
        if explanation is not None:
            logger.warning("%d blocks are missing: %s", len(blocks), explanation)

    def writes(self, store: BlockStore) -> None:
        """Have a store remember the model, before its first block is written there.

        Raises:
            StoreError: It cannot be written; tried again with the next block.
        """
        if store in self._remembered:
            return
        store.remember_fingerprint(self.fingerprint)
        with self._lock:
            self._remembered.add(store)

    def _first(self, known: WeakSet[BlockStore], store: BlockStore) -> bool:
        with self._lock:
            if store in known:
                return False
            known.add(store)
            return True
