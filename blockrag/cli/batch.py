"""The lines of a batch: prompts read from a JSON-lines file, answers appended to another, and where to go on.

A line of the output belongs to the line of the input at the same place. That is all the state there is, so a run that
was killed goes on behind the last whole line; what the two files say is compared, so that it never goes on in the
wrong file. Owns files and lines; knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any

from blockrag.cli.output import dump_json
from blockrag.errors import InputError

__all__ = ["BatchLine", "open_output", "read_lines", "result_of"]

# What the output adds; an input line's fields of these names are replaced.
_ADDED = frozenset({"generated", "usage", "finish_reason", "error"})


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One line of the input.

    Args:
        number: Counted from 1, blank lines included.
        fields: What the output keeps of it: its fields, or the number and the text of a line that is no JSON object.
        problem: Why it cannot be used; empty if it can.
    """

    number: int
    fields: Mapping[str, Any]
    problem: str = ""


def read_lines(path: Path) -> Iterator[BatchLine]:
    """The lines of the input that are not blank, one at a time.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, data in enumerate(file, start=1):
                if number == 1:
                    data = data.removeprefix(b"\xef\xbb\xbf")
                if data.strip():
                    yield _parsed(number, data)
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}); pass a file with one JSON object per line") from error


def result_of(line: BatchLine, added: Mapping[str, object]) -> bytes:
    """The output line: what the input line had, and what was added."""
    kept = {name: value for name, value in line.fields.items() if name not in _ADDED}
    return dump_json({**kept, **added}).encode() + b"\n"


def open_output(path: Path, lines: Iterator[BatchLine]) -> tuple[BufferedRandom, int, int]:
    """Open the output behind its last whole line; the input is read past the lines that are done.

    Args:
        path: Made if it is not there.
        lines: The input, at its beginning.

    Returns:
        The file, the number of lines that are done, and how many of these are errors.

    Raises:
        InputError: The file cannot be written, or its lines do not belong to this input. Nothing is changed.
    """
    try:
        file = path.open("r+b") if path.exists() else path.open("w+b")
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); pass another --output") from error
    try:
        done, failed, end = _compare(path, file, lines)
        # A last line without its end was cut off when the run was killed.
        file.truncate(end)
        file.seek(end)
    except BaseException:
        file.close()
        raise
    return file, done, failed


def _compare(path: Path, file: BufferedRandom, lines: Iterator[BatchLine]) -> tuple[int, int, int]:
    done = failed = end = 0
    for data in file:
        if not data.endswith(b"\n"):
            break
        done, end = done + 1, end + len(data)
        line = next(lines, None)
        try:
            result = json.loads(data)
            same = line is not None and _identity(line.fields) == _identity(result)
        except (ValueError, RecursionError, AttributeError):
            same = False
        if not same:
            raise InputError(
                f"{path}, line {done}, is not the result of line {done if line is None else line.number} of the input; "
                "pass another --output, or delete this one to begin anew"
            )
        failed += "error" in result
    return done, failed, end


def _identity(fields: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in fields.items() if name not in _ADDED}, sort_keys=True)


def _parsed(number: int, data: bytes) -> BatchLine:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    raw = {"line": number, "input": data.decode("utf-8", "replace").rstrip("\r\n")}
    try:
        fields = json.loads(data.decode("utf-8"), parse_constant=refuse)
        if not isinstance(fields, dict):
            return BatchLine(number, raw, f"a JSON {type(fields).__name__}, not an object; write one object per line")
        # Refuses what could be read and not be written again, such as 1e999.
        dump_json(fields)
    except (ValueError, RecursionError) as error:
        return BatchLine(number, raw, f"not valid JSON ({error}); write one object per line")
    return BatchLine(number, fields)
