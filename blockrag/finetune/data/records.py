"""Published files as records: JSON lines, a JSON list, one JSON object or parquet, each record with its place.

Which of these a file is says its beginning, not its name; all but parquet may be packed with gzip. Lines, lists and
parquet are read piece by piece: the candidate lists of TriviaQA alone are gigabytes. Nothing here knows data sets.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from blockrag.errors import DataError, MissingDependencyError
from blockrag.finetune.data.lines import parse_json

__all__ = ["Record", "read_records"]

_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_PIECE_CHARACTERS = 1 << 20
# A list that is not valid JSON would otherwise be read to its end before that is said.
_LONGEST_RECORD = 1 << 26
_ROWS_AT_ONCE = 1024
_WHITE_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Record:
    """One record as the data set has it.

    Args:
        fields: Its fields.
        where: What errors call it, e.g. "dev.json, record 3"; records of a list are counted from 1.
    """

    fields: Mapping[str, Any]
    where: str

    def list_of(self, name: str) -> list[Any]:
        """A field that must be a list.

        Raises:
            DataError: It is not there, or something else.
        """
        value = self.fields.get(name)
        if not isinstance(value, list):
            raise DataError(f"{self.where}: {name} must be a list, got {value!r:.60}; is this the right source?")
        return value

    def unpacked(self, name: str) -> Any:
        """A field that some copies of a data set keep as a string of JSON.

        Raises:
            DataError: It is a string that is not JSON.
        """
        value = self.fields.get(name)
        return (
            parse_json(value.encode("utf-8", "replace"), f"{self.where}, {name}") if isinstance(value, str) else value
        )

    def identity(self, *names: str) -> str:
        """The first of these fields that is there, as an id; empty if none is."""
        found = next((self.fields[name] for name in names if self.fields.get(name) not in (None, "")), "")
        return str(found)


def read_records(path: str | Path) -> Iterator[Record]:
    """The records of a file, one at a time.

    Raises:
        DataError: The file cannot be read, holds no record, or one is not a JSON object.
        MissingDependencyError: It is a parquet file and pyarrow is not installed.
    """
    path = Path(path)
    count = 0
    try:
        for where, value in _values(path):
            count += 1
            if not isinstance(value, dict):
                raise DataError(
                    f"{where}: a JSON {type(value).__name__}, not an object; is this a data set's own file?"
                )
            yield Record(value, where)
    except (OSError, EOFError, zlib.error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise DataError(f"cannot read {path} ({reason}); pass a data set's own file") from error
    if not count:
        raise DataError(f"{path} holds no records; pass a data set's own file")


def _values(path: Path) -> Iterator[tuple[str, object]]:
    with ExitStack() as stack:
        file: BinaryIO = stack.enter_context(path.open("rb"))
        magic = file.read(4)
        file.seek(0)
        if magic == _PARQUET:
            yield from _parquet_rows(path)
            return
        if magic[:2] == _GZIP:
            file = stack.enter_context(gzip.open(file))  # type: ignore[assignment]
        first = _first_character(file)
        if first == b"[":
            yield from _list_items(path, file)
        else:
            yield from _json_lines(path, file)


def _first_character(file: BinaryIO) -> bytes:
    """The first byte that is not white space; the file is at its beginning afterwards."""
    first = b" "
    while first and first in b" \t\r\n\xef\xbb\xbf":
        first = file.read(1)
    file.seek(0)
    return first


def _json_lines(path: Path, file: BinaryIO) -> Iterator[tuple[str, object]]:
    """One object per line; or one object over all lines, as SQuAD is published."""
    for number, data in enumerate(file, start=1):
        if not data.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = parse_json(data, where)
        except DataError as error:
            if number > 1:
                raise
            try:
                value = json.loads((data + file.read()).decode("utf-8-sig"))
            except (ValueError, RecursionError):
                raise error from None
            where = str(path)
        yield where, value


def _list_items(path: Path, file: BinaryIO) -> Iterator[tuple[str, object]]:
    """The items of one JSON list, each decoded as soon as it is whole."""
    number = 0
    try:
        with io.TextIOWrapper(file, encoding="utf-8-sig") as text:
            for item in _decoded_items(text):
                number += 1
                yield f"{path}, record {number}", item
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}, record {number + 1}: not valid JSON ({error}); is the file whole?") from error


def _decoded_items(text: TextIO) -> Iterator[object]:
    """Items of a list, from text that is read as it is needed.

    Raises:
        ValueError: The list does not begin or end, or an item is not valid JSON, or too long to be a record.
    """
    pieces = _Pieces(text)
    pieces.take("[")
    if pieces.next_character() != "]":
        yield pieces.item()
        while pieces.next_character() == ",":
            pieces.take(",")
            yield pieces.item()
    pieces.take("]")
    if rest := pieces.next_character():
        raise ValueError(f"there is more behind the list, beginning with {rest!r}")


class _Pieces:
    """JSON text of which a piece is held at a time."""

    def __init__(self, text: TextIO) -> None:
        def refuse(constant: str) -> None:
            raise ValueError(f"{constant} is not JSON")

        self._text = text
        self._decoder = json.JSONDecoder(parse_constant=refuse)
        self._held, self._at = "", 0

    def next_character(self) -> str:
        """The next character that is not white space, which stays; empty at the end."""
        while True:
            self._at = _WHITE_SPACE.match(self._held, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._held):
                return self._held[self._at]
            if not self._read(_PIECE_CHARACTERS):
                return ""

    def take(self, character: str) -> None:
        """Go past the next character."""
        if (found := self.next_character()) != character:
            raise ValueError(f"expected {character!r}, got {found or 'the end of the file'!r}")
        self._at += 1

    def item(self) -> object:
        """The value that comes next. A number may be cut short, but only objects are records."""
        self.next_character()
        wanted = _PIECE_CHARACTERS
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._held, self._at)
            except json.JSONDecodeError:
                if len(self._held) - self._at > _LONGEST_RECORD or not self._read(wanted):
                    raise
                # Twice as much each time, so that decoding anew costs no more than the reading.
                wanted *= 2
            else:
                return value

    def _read(self, characters: int) -> bool:
        more = self._text.read(characters)
        self._held, self._at = self._held[self._at :] + more, 0
        return bool(more)


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingDependencyError(
            f"{path} is a parquet file, which pyarrow reads; install it with: pip install 'blockrag[data]'"
        ) from error

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}, row {number + 1}: not a whole parquet file ({error}); fetch it again") from error
