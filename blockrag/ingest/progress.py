"""How far a pass is: a protocol of three methods, and a bar for people who wait.

The pass reports facts as they happen; what is drawn from them, and whether anything is, is decided here. A report
goes to standard error, so that standard output stays for results, and only where a terminal shows it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichBar

__all__ = ["Progress", "RichProgress"]


class Progress(Protocol):
    """Told by `ingest` how far it is. What it raises ends the pass; what was committed stays."""

    def start(self, total_documents: int | None) -> None:
        """The pass begins; about how many documents there are, where that can be told before reading."""
        ...

    def advance(self, *, documents: int = 0, passages: int = 0, tokens: int = 0) -> None:
        """So many more documents are done, passages stored, tokens prefilled; called after every block."""
        ...

    def finish(self) -> None:
        """The pass is over, by success, error or interruption."""
        ...


class RichProgress:
    """A progress bar with documents, passages, tokens per second, elapsed and remaining time.

    Args:
        console: Where to draw; standard error by default. Nothing is drawn where that is no terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._bar: RichBar | None = None
        self._passages = 0
        self._tokens = 0

    def start(self, total_documents: int | None) -> None:
        """Draw the bar; without a total it only shows that something moves."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichBar

        console = self._console or Console(stderr=True)
        self._bar = RichBar(
            TextColumn("documents"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[passages]:,} passages  {task.fields[rate]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._passages = self._tokens = 0
        self._bar.add_task("ingest", total=total_documents, passages=0, rate=0.0)
        self._bar.start()

    def advance(self, *, documents: int = 0, passages: int = 0, tokens: int = 0) -> None:
        """Move the bar."""
        if self._bar is None:
            return
        self._passages += passages
        self._tokens += tokens
        task = self._bar.tasks[0]
        rate = self._tokens / task.elapsed if task.elapsed else 0.0
        self._bar.update(task.id, advance=documents, passages=self._passages, rate=rate)

    def finish(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
