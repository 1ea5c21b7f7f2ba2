"""What a command writes and how it ends: results on standard output, everything else on standard error, an exit code.

Every command runs inside `reporting`, the one place that turns errors into a line and an exit code, shows warnings as
one line each, and keeps standard output to a single JSON object where that was asked for. What no part of blockrag
raises on purpose is a defect and keeps its traceback.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from blockrag.errors import BlockRAGError, PassageIndexError, StoreError, UnsupportedModelError
from blockrag.model.facts import NotBlockFineTunedWarning
from blockrag.model.trained import BeyondTrainingWarning

__all__ = [
    "DOES_NOT_FIT",
    "EXIT_CODES",
    "PARTLY_FAILED",
    "UNUSABLE",
    "Output",
    "clean",
    "dump_json",
    "quiet_transformers",
    "reporting",
]

PARTLY_FAILED = 1
_USER_MISTAKE = 2
UNUSABLE = DOES_NOT_FIT = 3
_INTERRUPTED = 130

EXIT_CODES = """\
\b
Exit codes:
    0  everything was done
    1  it ran, but part of it failed (bad documents or lines, a refused model)
    2  a mistake in the call (bad arguments, missing files)
    3  the store or the index cannot be used (damaged, foreign, locked, full)
  130  interrupted
"""

# Warnings that are shown as lines.
_SAID = (NotBlockFineTunedWarning, BeyondTrainingWarning)

# Text from models and documents must not move the cursor or set a terminal's title; line ends and tabs may stay.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class Output:
    """Where one command writes.

    Args:
        as_json: Standard output gets one JSON object and nothing else.
        silent: Nothing is written: another process of the same command speaks.
    """

    def __init__(self, *, as_json: bool, silent: bool = False) -> None:
        self.as_json = as_json
        self.exit_code = 0
        self.messages = Console(stderr=True, highlight=False, quiet=silent)
        self._results = Console(highlight=False, quiet=silent)
        self._json_written = silent

    @property
    def is_terminal(self) -> bool:
        """Whether somebody watches the results as they come."""
        return self._results.is_terminal

    def show(self, *renderables: RenderableType) -> None:
        """Print results for people; silent where JSON was asked for.

        A string is taken as it is, without markup; a `Text` takes one line and is cut where that ends.
        """
        if not self.as_json:
            for renderable in renderables:
                if isinstance(renderable, str):
                    self._results.print(clean(renderable), markup=False, soft_wrap=True)
                elif isinstance(renderable, Text):
                    self._results.print(renderable, no_wrap=True, overflow="ellipsis")
                else:
                    self._results.print(renderable)

    def piece(self, text: str) -> None:
        """Print a piece of an answer at once, without a line end."""
        if not self.as_json:
            sys.stdout.write(clean(text))
            sys.stdout.flush()

    def result(self, value: Mapping[str, object]) -> None:
        """Print the result for programs, if JSON was asked for."""
        if self.as_json and not self._json_written:
            self._json_written = True
            sys.stdout.write(dump_json(value, encoding=sys.stdout.encoding or "utf-8") + "\n")
            sys.stdout.flush()

    def note(self, message: str) -> None:
        """One line about what is going on."""
        self._line("", "", message)

    def warning(self, message: str) -> None:
        """One line about what may be wrong."""
        self._line("warning: ", "yellow", message)

    def error(self, message: str) -> None:
        """One line about what went wrong."""
        self._line("error: ", "bold red", message)

    def working(self, message: str) -> AbstractContextManager[object]:
        """Something that moves while people wait; nothing where nobody does."""
        return self.messages.status(message) if self.messages.is_terminal else nullcontext()

    def _line(self, label: str, style: str, message: str) -> None:
        self.messages.print(Text(label, style=style).append(" ".join(clean(message).split())), soft_wrap=True)


@contextmanager
def reporting(as_json: bool, *, silent: bool = False) -> Iterator[Output]:
    """Run a command: gives its `Output`, and ends the process with the exit code that fits what happened.

    What a KeyboardInterrupt says is shown, so that a command can tell what it leaves.

    Raises:
        typer.Exit: With a code other than 0, if something failed.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A title that this terminal's encoding lacks is no reason to lose the answer.
            stream.reconfigure(errors="replace")
    out = Output(as_json=as_json, silent=silent)
    try:
        with _warnings_as_lines(out):
            yield out
    except BlockRAGError as error:
        code = _exit_code(error)
        out.error(str(error))
        out.result({"error": {"type": type(error).__name__, "message": str(error)}})
        raise typer.Exit(code) from None
    except KeyboardInterrupt as interrupt:
        message = str(interrupt) or "interrupted; what was stored stays, and the same command goes on from there"
        out.error(message)
        out.result({"error": {"type": "KeyboardInterrupt", "message": message}})
        raise typer.Exit(_INTERRUPTED) from None
    if out.exit_code:
        raise typer.Exit(out.exit_code)


def clean(text: str) -> str:
    """Text that is safe to print: control characters other than line end and tab become U+FFFD."""
    return _CONTROL.sub("\ufffd", text)


def dump_json(value: object, *, encoding: str = "utf-8") -> str:
    """One line of JSON that can be written in an encoding; readable where that is possible.

    Raises:
        ValueError: A number is not finite.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False)
    return text


def quiet_transformers() -> None:
    """No loading bars and no advice from transformers in a command's output."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # Its retries, one line each; the error that they end in says what failed.
    hub_logging.set_verbosity(logging.ERROR)


def _exit_code(error: BlockRAGError) -> int:
    if isinstance(error, UnsupportedModelError):
        return PARTLY_FAILED
    return UNUSABLE if isinstance(error, (StoreError, PassageIndexError)) else _USER_MISTAKE


class _LogLines(logging.Handler):
    """The library's log, as warnings of the command."""

    def __init__(self, out: Output) -> None:
        super().__init__(logging.WARNING)
        self._out = out

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        self._out.warning(record.getMessage())


@contextmanager
def _warnings_as_lines(out: Output) -> Iterator[None]:
    """Show blockrag's warnings and log as lines; other libraries' advice only where Python was told to (-W)."""
    handler, logger = _LogLines(out), logging.getLogger("blockrag")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            for said in _SAID:
                warnings.simplefilter("always", said)
            original = warnings.showwarning

            def show(message: Warning | str, category: type[Warning], *place: object) -> None:
                if issubclass(category, _SAID):
                    out.warning(str(message))
                else:
                    original(message, category, *place)  # type: ignore[arg-type]

            warnings.showwarning = show  # type: ignore[assignment]
            yield
    finally:
        logger.removeHandler(handler)
