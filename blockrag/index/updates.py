"""What an update means for a document's passages, and what cannot be stored: decided before anything is written."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from blockrag.errors import InputError
from blockrag.index.database import SUPERSEDED, StoredPassage
from blockrag.index.digests import encode_metadata
from blockrag.index.records import DocumentUpdate
from blockrag.passage import Passage

__all__ = ["Plan", "additions", "check_updates", "plan_document", "storable"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What an update does to one document's passages, with their places in it."""

    document_id: str
    fresh: list[tuple[int, Passage]]
    kept: list[tuple[int, StoredPassage, Passage]]
    gone: list[StoredPassage]

    @property
    def changes(self) -> bool:
        """Whether passages come or go."""
        return bool(self.fresh or self.gone)


def additions(
    passages: Sequence[Passage], block_keys: Mapping[str, Sequence[str]] | None, fingerprint: str
) -> list[DocumentUpdate]:
    """Passages of any documents, to be added, as one update for each document.

    Raises:
        InputError: Block keys are given for another passage.
    """
    grouped: dict[str, list[Passage]] = {}
    for passage in passages:
        grouped.setdefault(passage.document_id, []).append(passage)
    unknown = set(block_keys or ()) - {passage.id for passage in passages}
    if unknown:
        raise InputError(f"block keys are given for passage {min(unknown)!r}, which is not among those added")
    updates = []
    for name, group in grouped.items():
        keys = {passage.id: block_keys[passage.id] for passage in group if block_keys and passage.id in block_keys}
        updates.append(DocumentUpdate(name, group, block_keys=keys, fingerprint=fingerprint))
    return updates


def plan_document(
    update: DocumentUpdate, stored: Sequence[StoredPassage], replace: bool, changed: Collection[str]
) -> Plan:
    """Compare an update with what is stored: equal title and text under an id that is not `changed` means kept."""
    plan = Plan(update.document_id, [], [], [])
    left = {passage.id: passage for passage in stored}
    end = max((passage.ordinal + 1 for passage in stored), default=0)
    for place, passage in enumerate(update.passages):
        old = left.pop(passage.id, None)
        ordinal = place if replace else (end + place if old is None else old.ordinal)
        same = old is not None and (old.title, old.text) == (passage.title, passage.text)
        if old is not None and same and passage.id not in changed:
            plan.kept.append((ordinal, old, passage))
            continue
        plan.fresh.append((ordinal, passage))
        if old is not None:
            plan.gone.append(old)
    if replace:
        plan.gone.extend(left.values())
    return plan


def check_updates(documents: Sequence[DocumentUpdate]) -> None:
    """Refuse what cannot be stored, before anything is embedded."""
    documents_seen: set[str] = set()
    passages_seen: set[str] = set()
    for update in documents:
        if not update.document_id or update.document_id in documents_seen:
            problem = "occurs twice in one update" if update.document_id else "is empty"
            raise InputError(f"document id {update.document_id!r} {problem}; give each document one id of its own")
        documents_seen.add(update.document_id)
        for name in ("document_id", "content_hash", "fingerprint"):
            storable(name, getattr(update, name))
        if update.fingerprint == SUPERSEDED:
            raise InputError(f"{SUPERSEDED!r} is no fingerprint; pass the model's fingerprint.digest")
        for passage in update.passages:
            _check_passage(passage, update.document_id, passages_seen)
        _check_block_keys(update)


def _check_passage(passage: Passage, document_id: str, seen: set[str]) -> None:
    if passage.document_id != document_id:
        raise InputError(
            f"passage {passage.id!r} names document {passage.document_id!r}, not {document_id!r}; pass "
            f"Passage(document_id={document_id!r})"
        )
    if passage.id in seen:
        raise InputError(f"passage id {passage.id!r} occurs twice; ids are unique in an index")
    seen.add(passage.id)
    encode_metadata(passage)


def _check_block_keys(update: DocumentUpdate) -> None:
    ids = {passage.id for passage in update.passages}
    for passage_id, keys in (update.block_keys or {}).items():
        if passage_id not in ids:
            raise InputError(
                f"block keys are given for passage {passage_id!r}, which document {update.document_id!r} does not have"
            )
        for key in keys:
            storable("block key", key)


def storable(what: str, text: str) -> None:
    """Refuse lone surrogates, which no UTF-8 file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} {text!r} holds a lone surrogate; decode its source with errors='replace'") from error
