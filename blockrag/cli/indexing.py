"""`blockrag ingest`, `stats` and `delete`: what lies in an index directory."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from blockrag.cli.directory import built_with, open_parts, open_settings, prepare, remember
from blockrag.cli.options import (
    AsJson,
    AttentionOption,
    Encoder,
    IndexPath,
    Model,
    PrecisionOption,
    attention_of,
    precision_of,
)
from blockrag.cli.output import PARTLY_FAILED, clean, reporting
from blockrag.errors import InputError

if TYPE_CHECKING:
    from blockrag.index import DocumentInfo
    from blockrag.ingest import IngestReport

__all__ = ["delete", "ingest", "report_json", "size", "stats"]

Sources = Annotated[list[Path], typer.Argument(metavar="SOURCES...", help="Files and folders.")]
MaxPassageTokens = Annotated[
    int | None,
    typer.Option("--max-passage-tokens", min=1, help="Longest passage; by default 256, or what was used before."),
]
Prune = Annotated[bool, typer.Option("--prune", help="Remove documents that SOURCES no longer have.")]
MaxBytes = Annotated[
    str | None,
    typer.Option("--max-bytes", metavar="SIZE", help="Budget of the stored KV states, e.g. 200GB; oldest go first."),
]
SwitchModel = Annotated[
    bool, typer.Option("--switch-model", help="Use --model from now on, though it was built with another.")
]
Documents = Annotated[bool, typer.Option("--documents", help="List the documents too.")]


def ingest(
    sources: Sources,
    path: IndexPath,
    model: Model = None,
    encoder: Encoder = None,
    attention: AttentionOption = None,
    precision: PrecisionOption = None,
    max_passage_tokens: MaxPassageTokens = None,
    prune: Prune = False,
    max_bytes: MaxBytes = None,
    switch_model: SwitchModel = False,
    as_json: AsJson = False,
) -> None:
    """Index documents, store their KV states.

    What is there already and has not changed costs no model work; a pass that was stopped goes on where it was.
    Model ('demo' at first), encoder ('lexical'), attention, precision and passage length are remembered in
    DIR/blockrag.json.
    """
    with reporting(as_json) as out:
        for source in sources:
            if not source.exists():
                raise InputError(f"there is no file or folder {str(source)!r}; pass paths that exist")
        from blockrag.ingest import RichProgress
        from blockrag.stores import parse_bytes

        settings = prepare(
            path,
            model=model,
            encoder=encoder,
            attention=attention_of(attention),
            precision=precision_of(precision),
            max_passage_tokens=max_passage_tokens,
            max_bytes=None if max_bytes is None else parse_bytes(max_bytes),
            switch_model=switch_model,
        )
        with open_settings(out, path, settings) as rag:
            # Before the work: a pass that is stopped goes on with the same choices.
            remember(path, settings)
            report = rag.ingest(
                sources,
                max_passage_tokens=settings.max_passage_tokens,
                prune=prune,
                progress=RichProgress(out.messages),
            )
        out.show(str(report))
        out.result({"path": str(path), **asdict(settings), **report_json(report)})
        if report.failures:
            out.exit_code = PARTLY_FAILED
            out.error(f"{_count(len(report.failures), 'document')} failed; correct them and run the same command again")


def stats(path: IndexPath, documents: Documents = False, as_json: AsJson = False) -> None:
    """Show what an index directory holds."""
    with reporting(as_json) as out:
        settings = built_with(path)
        with open_parts(path) as (index, store):
            about_index, about_store, written_for = index.stats(), store.stats(), store.fingerprints()
            listed = index.documents() if documents else []
        remembered = None if settings is None else asdict(settings)
        contents = {name: getattr(about_store, name) for name in ("blocks", "bytes", "max_bytes")}
        contents["fingerprints"] = sorted(written_for)
        budget = "no limit" if about_store.max_bytes is None else f"of {size(about_store.max_bytes)}"
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        rows = {
            "model": "not remembered" if settings is None else settings.model,
            "encoder": f"{about_index.encoder} ({about_index.dimension:,} dimensions)",
            "documents": f"{about_index.documents:,}",
            "passages": f"{about_index.passages:,} ({size(about_index.bytes)}, {about_index.kind} index)",
            "blocks": f"{counted(about_store.blocks)} ({size(about_store.bytes)}, {budget})",
        }
        if written_for:
            shown = (f"{digest[:8]}... ({one.compute_dtype}, {one.precision})" for digest, one in written_for.items())
            rows["written for"] = ", ".join(sorted(shown))
        for name, value in rows.items():
            table.add_row(Text(name, style="dim"), Text(clean(value)))
        out.show(table)
        if documents:
            out.show("", _document_table(listed))
        result = {"path": str(path), "settings": remembered, "index": asdict(about_index), "store": contents}
        out.result({**result, "documents": [asdict(document) for document in listed]} if documents else result)


def delete(
    document_id: Annotated[str, typer.Argument(metavar="DOCUMENT_ID", help="As `stats --documents` lists it.")],
    path: IndexPath,
    as_json: AsJson = False,
) -> None:
    """Remove a document from an index.

    Its passages go, and the blocks that no other passage uses.
    """
    with reporting(as_json) as out:
        with open_parts(path) as (index, store):
            known = index.document_hash(document_id) is not None
            if not known and next(index.passages(document_id), None) is None:
                raise InputError(
                    f"there is no document {document_id!r} in {path}; blockrag stats --documents --path {path} lists "
                    "them"
                )
            from blockrag.ingest import delete as delete_document

            change = delete_document(document_id, index=index, store=store)
        blocks = len(change.orphaned_block_keys)
        out.show(f"{document_id}: deleted with {_count(change.removed, 'passage')} and {_count(blocks, 'block')}")
        out.result({"document_id": document_id, "passages_deleted": change.removed, "blocks_deleted": blocks})


def report_json(report: IngestReport) -> dict[str, object]:
    """What a pass did, as JSON types."""
    failures = [
        {"source": failure.source, "document_id": failure.document_id, "error": str(failure.error)}
        for failure in report.failures
    ]
    counts = {name: getattr(report, name) for name in report.__slots__ if name != "failures"}
    return {**counts, "failures": failures}


def size(nbytes: int | None) -> str:
    """Bytes in the largest binary unit that gives a number of at least one; None is not known."""
    if nbytes is None:
        return "size not known"
    value, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{nbytes} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def counted(number: int | None) -> str:
    """A number for reading; None was not counted, as in a bucket."""
    return "not counted" if number is None else f"{number:,}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _document_table(documents: list[DocumentInfo]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("passages", justify="right", style="dim")
    table.add_column("document", overflow="fold")
    for document in documents:
        table.add_row(f"{document.passages:,}", Text(clean(document.document_id)))
    return table
