r"""The `blockrag` command: every part of the library that is worth a command line, and nothing that is not in it.

    options.py    options that several commands share
    output.py     where results and messages go, errors to exit codes
    directory.py  an index directory, and what it remembers
    answers.py    an answer, for people and for programs
    indexing.py   ingest, stats, delete
    asking.py     query, chat
    verifying.py  verify
    checking_store.py   verify-store
    planning.py   plan
    batch.py, generating.py   generate
    serving.py    serve
    benching.py   bench
    evaluating.py eval
    data.py       data
    finetuning.py finetune, presets
    demo.py       demo

Only this package imports typer. Heavy libraries are imported when a command needs them, so `--help` and mistakes in
the call answer at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from blockrag import __version__
from blockrag.cli.asking import chat, query
from blockrag.cli.benching import bench
from blockrag.cli.checking_store import verify_store
from blockrag.cli.data import data
from blockrag.cli.demo import demo
from blockrag.cli.evaluating import evaluate
from blockrag.cli.finetuning import finetune, presets
from blockrag.cli.generating import generate
from blockrag.cli.indexing import delete, ingest, stats
from blockrag.cli.output import EXIT_CODES
from blockrag.cli.planning import plan
from blockrag.cli.serving import serve
from blockrag.cli.verifying import verify

__all__ = ["app", "main"]

app = typer.Typer(
    name="blockrag",
    no_args_is_help=True,
    add_completion=False,
    # Plain help: readable in a pipe, and its line ends stay where they are meant.
    rich_markup_mode=None,
    # An exception that is no BlockRAGError is a defect; its traceback is wanted as Python prints it.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for _command in (demo, plan, ingest, query, chat, stats, delete, verify, generate, finetune, presets, serve):
    app.command(epilog=EXIT_CODES, no_args_is_help=False)(_command)
app.command(name="verify-store", epilog=EXIT_CODES, no_args_is_help=False)(verify_store)
app.command(name="eval", epilog=EXIT_CODES, no_args_is_help=False)(evaluate)
app.add_typer(bench, name="bench")
app.add_typer(data, name="data")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"blockrag {__version__}")
        raise typer.Exit


@app.callback(epilog=EXIT_CODES)
def _blockrag(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Answer questions from passages whose KV states are computed once, when they are indexed.

    Start with: blockrag demo
    """


def main() -> None:
    """Run the command; the entry point of the installed script."""
    app(prog_name="blockrag")
