"""Choosing, joining and shuffling lines of data files, repeatably, without holding the files.

The positions chosen and their order are those of Python's `random.sample` and `random.shuffle` of the list of all
lines, seeded anew for each step; conversations are drawn before the shuffle, by the same generator. This is what the
published preparation does with seed 42, so the same lines in the same order give the same file.
Source: data_process/random_sample.py, merge.py and stepx_merge_tulu3_rag.py of TemporaryLoRA/Block-Attention.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from blockrag.errors import DataError, InputError
from blockrag.finetune.data.lines import BYTE_ORDER_MARK, ChatLine, Line, parse_json, parse_line

__all__ = ["LineFile", "merge_lines", "sample_lines"]


class LineFile:
    """A data file whose lines are read one at a time, in any order; holds sixteen bytes a line.

    Args:
        path: The file; it must not change while it is open.

    Raises:
        DataError: The file cannot be read, or holds no line.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._starts, self._numbers = array("q"), array("q")
        try:
            self._file = self._path.open("rb")
            start = 0
            for number, data in enumerate(self._file, start=1):
                if data.removeprefix(BYTE_ORDER_MARK).strip():
                    self._starts.append(start)
                    self._numbers.append(number)
                start += len(data)
        except OSError as error:
            raise DataError(f"cannot read {path} ({error.strerror}); pass a file of JSON lines") from error
        if not self._starts:
            self._file.close()
            raise DataError(f"{path} holds no lines; see `blockrag data` for what makes one")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, position: int) -> Line:
        """The line at a position, counted from 0 without blank lines.

        Raises:
            DataError: It is malformed; names the file and the line.
        """
        self._file.seek(self._starts[position])
        where = self.where(position)
        return parse_line(parse_json(self._file.readline(), where), where)

    def where(self, position: int) -> str:
        """What errors call that line."""
        return f"{self._path}, line {self._numbers[position]}"

    def __enter__(self) -> LineFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def sample_lines(path: str | Path, n: int, *, seed: int = 42) -> Iterator[Line]:
    """`n` lines of a file, in the order in which they were drawn.

    Raises:
        DataError: See `LineFile`; or a line that was drawn is malformed.
        InputError: The file holds fewer lines, or `n` is below 1.
    """
    with LineFile(path) as lines:
        for position in _drawn(path, lines, n, random.Random(seed)):
            yield lines[position]


def merge_lines(
    paths: Sequence[str | Path],
    *,
    seed: int = 42,
    shuffle: bool = True,
    chat: str | Path | None = None,
    chat_ratio: float = 1.0,
) -> Iterator[Line]:
    """All lines of some files, shuffled together; with conversations among them if wanted.

    Args:
        paths: The files.
        seed: Of the shuffle, and of which conversations are drawn.
        shuffle: Whether to; otherwise the files stay one after the other, conversations last.
        chat: A file of conversations to draw from.
        chat_ratio: Conversations per line of the other files.

    Raises:
        DataError: See `LineFile`; or a line is malformed, or one of `chat` is no conversation.
        InputError: There are fewer conversations than wanted, or the ratio is not a finite number above 0.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(LineFile(path)) for path in paths]
        places = [(file, position) for file in files for position in range(len(file))]
        draw = random.Random(seed)
        talk = None if chat is None else stack.enter_context(LineFile(chat))
        if talk is not None and chat is not None:
            if not 0 < chat_ratio < math.inf:
                raise InputError(
                    f"chat_ratio must be a finite number above 0, got {chat_ratio}; pass 1 for as many conversations"
                )
            wanted = max(1, round(chat_ratio * len(places)))
            places += [(talk, position) for position in _drawn(chat, talk, wanted, draw)]
        if shuffle:
            draw.shuffle(places)
        for file, position in places:
            line = file[position]
            if file is talk and not isinstance(line, ChatLine):
                raise DataError(f"{file.where(position)}: no conversation; pass a file of messages to mix in")
            yield line


def _drawn(path: str | Path, lines: LineFile, n: int, draw: random.Random) -> list[int]:
    if not 1 <= n <= len(lines):
        raise InputError(
            f"cannot draw {n:,} lines from {path}, which holds {len(lines):,}; ask for 1 to {len(lines):,}"
        )
    return draw.sample(range(len(lines)), n)
