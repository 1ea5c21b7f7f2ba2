"""`blockrag verify-store`: whether what lies in a directory or a store is what was written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Annotated
from urllib.parse import unquote

import typer
from rich.table import Table
from rich.text import Text

from blockrag.cli.indexing import size
from blockrag.cli.options import AsJson
from blockrag.cli.output import PARTLY_FAILED, UNUSABLE, Output, clean, reporting
from blockrag.errors import InputError, StoreError

if TYPE_CHECKING:
    from blockrag.ingest.checking import DirectoryReport
    from blockrag.stores import BlockStore
    from blockrag.stores.report import Fault

__all__ = ["verify_store"]

_FAULTS_SHOWN = 20
_REDRAWN_S = 0.2


def verify_store(
    place: Annotated[str, typer.Argument(metavar="PATH|URL", help="A directory of `ingest`, or a block store.")],
    fix: Annotated[
        bool, typer.Option("--fix", help="Remove damaged blocks, make again what follows from the passages.")
    ] = False,
    delete_unused: Annotated[
        bool,
        typer.Option(
            "--delete-unused",
            help="Delete blocks that no passage of this index has. Not in a shared store, nor during an ingestion.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every block, the index, and each against the other.

    Blocks: their checksum, that they are the block of their key, and what the store keeps of them. Index: the database,
    every vector, and what is kept twice. Blocks that were evicted are no fault: they are computed again.

    Exit code 1 if something is wrong and was not mended, 3 if the index or the store cannot be opened.
    """
    with reporting(as_json) as out:
        report = _checked(out, place, fix=fix, delete_unused=delete_unused)
        _show(out, report, fix=fix)
        out.result(_as_json(report))
        if report.unusable:
            out.exit_code = UNUSABLE
        elif not report.ok:
            out.exit_code = PARTLY_FAILED


def _checked(out: Output, place: str, *, fix: bool, delete_unused: bool) -> DirectoryReport:
    from blockrag.ingest.checking import check_directory, check_store
    from blockrag.stores import open_store

    @contextmanager
    def watch(store: BlockStore) -> Iterator[None]:
        with _progress(out, store):
            yield

    scheme, separator, rest = place.partition("://")
    if scheme == "disk":
        # Opening it would make it.
        place, separator = unquote(rest.partition("?")[0]), ""
    if not separator:
        path = Path(place).expanduser()
        return check_directory(path, fix=fix, delete_unused=delete_unused, watch=watch)
    if delete_unused:
        raise InputError(
            f"{place!r} is a store without an index; --delete-unused needs a directory of `blockrag ingest`"
        )
    with closing(open_store(place)) as store:
        return check_store(store, fix=fix, watch=watch)


@contextmanager
def _progress(out: Output, store: BlockStore) -> Iterator[None]:
    """A bar of the blocks that were read, for people who wait; what is read is what the store counts."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not out.messages.is_terminal:
        yield
        return
    columns = (TextColumn("blocks"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out.messages, transient=True) as bar:
        before = store.stats()
        task = bar.add_task("verify", total=before.blocks)
        over = Event()

        def follow() -> None:
            while not over.wait(_REDRAWN_S):
                try:
                    now = store.stats()
                except StoreError:
                    # The check itself meets the same, and says so.
                    return
                bar.update(task, completed=now.hits + now.misses - before.hits - before.misses)

        thread = Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _show(out: Output, report: DirectoryReport, *, fix: bool) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for label, value in _facts(report).items():
        table.add_row(Text(label, style="dim"), Text(clean(value)))
    out.show(table)
    open_faults = [fault for fault in report.faults if not fault.fixed]
    mended = [fault for fault in report.faults if fault.fixed]
    for title, faults in (("mended", mended), ("wrong", open_faults)):
        if faults:
            out.show("", f"{title}:", *(f"  {_line(fault)}" for fault in faults[:_FAULTS_SHOWN]))
            if len(faults) > _FAULTS_SHOWN:
                out.show(f"  and {len(faults) - _FAULTS_SHOWN:,} more; --json lists all")
    for reason in report.unusable:
        out.error(reason)
    if open_faults:
        advice = "what is left needs a hand" if fix else "--fix mends what can be mended"
        count = len(open_faults)
        out.error(f"{count:,} {'fault' if count == 1 else 'faults'}; {advice}")
    elif report.ok:
        out.show("", "everything is sound" if not mended else "everything is sound now")


def _line(fault: Fault) -> str:
    return " ".join(clean(f"{fault.kind}: {fault.where}: {fault.message}").split())


def _facts(report: DirectoryReport) -> dict[str, str]:
    facts = {"checked": report.where}
    if report.index is not None:
        facts["index"] = f"{report.index.passages:,} passages of {report.index.documents:,} documents"
        facts["encoder"] = report.index.encoder
    if report.store is not None:
        facts["store"] = f"{report.store.blocks:,} sound blocks ({size(report.store.bytes)})"
        for digest, blocks in sorted(report.store.fingerprints.items(), key=lambda item: -item[1]):
            facts[f"model {digest[:8]}"] = f"{blocks:,} blocks"
    if report.missing:
        facts["not stored"] = f"{report.missing:,} blocks of passages; they are computed when they are needed"
    if report.unused:
        done = f"{report.deleted:,} deleted" if report.deleted else "first and last parts of prompts, or other indexes'"
        facts["no passage's"] = f"{report.unused:,} blocks ({size(report.unused_bytes)}): {done}"
    return facts


def _as_json(report: DirectoryReport) -> dict[str, object]:
    index, store = report.index, report.store
    return {
        "path": report.where,
        "ok": report.ok,
        "index": index and {"passages": index.passages, "documents": index.documents, "encoder": index.encoder},
        "store": store
        and {"url": store.url, "blocks": store.blocks, "bytes": store.bytes, "fingerprints": dict(store.fingerprints)},
        "missing_blocks": report.missing,
        "unused_blocks": report.unused,
        "unused_bytes": report.unused_bytes,
        "deleted_blocks": report.deleted,
        "faults": [asdict(fault) for fault in report.faults],
        "unusable": list(report.unusable),
    }
