"""A file of predictions: what one model answered in one mode, a JSON line each, behind a header that says how.

The header pins down everything that decides the answers: the model by its fingerprint, the mode, every question with
its passages by a digest, the options. A run that was killed goes on behind the last whole line; a file that does not
belong to the run is refused, never continued and never overwritten. Where and when it was made is kept beside that and
not compared.

Owns files; knows neither models nor what the numbers mean.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import SEEK_END, BufferedRandom
from pathlib import Path
from types import TracebackType
from typing import Any

from blockrag.errors import DataError, InputError

__all__ = ["Prediction", "Predictions", "Tokens", "read_predictions"]

_FORMAT = 1
# Every header begins with this.
_BEGINNING = b'{"blockrag_predictions": '
_COMPARED = ("model", "mode", "data", "options")


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one question, counted as by a store that keeps every block of the questions before it.

    So that the counts of a file depend neither on where a run was interrupted nor on what else ran.

    Args:
        prompt: Of the whole prompt.
        blocks: How many blocks of the prompt see only themselves.
        reused: Of blocks that an earlier question of the file had, or an earlier place of the prompt.
        missed: Lengths of the other blocks, which are computed for this question.
        query: Of what sees everything before it: computed for every question.
        new: Of the answer.
    """

    prompt: int
    blocks: int
    reused: int
    missed: tuple[int, ...]
    query: int
    new: int

    @property
    def computed(self) -> int:
        """Tokens that go through the model before the first token of the answer."""
        return self.query + sum(self.missed)


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answer.

    Args:
        index: The question's number among those asked, from 0.
        line: The line of the data file, from 1; questions of one line share passages.
        id: The data set's.
        kind: Of the question.
        mode: How it was answered.
        question: The question.
        answers: What counts as right.
        prediction: The raw answer; empty after an error.
        scores: By the name of the metric; empty where others judge.
        tokens: What it cost.
        finish_reason: "stop" or "length"; empty after an error.
        error: Why there is no answer; empty if there is one. Such an answer counts as wrong.
        prompt: What was asked, where no question and passages say it.
    """

    index: int
    line: int
    id: str
    kind: str
    mode: str
    question: str
    answers: tuple[str, ...]
    prediction: str
    scores: dict[str, float]
    tokens: Tokens
    finish_reason: str = ""
    error: str = ""
    prompt: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON types; `from_json` reads them."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Prediction:
        """What `to_json` gave.

        Raises:
            TypeError: A field is missing or unknown.
        """
        tokens = {**fields["tokens"], "missed": tuple(fields["tokens"]["missed"])}
        return cls(**{**fields, "answers": tuple(fields["answers"]), "tokens": Tokens(**tokens)})


class Predictions:
    """A file of predictions, open for the answers that are missing.

    The header is written with the first answer, so that a run that never came to one stands in nobody's way.

    Args:
        path: Made, with its directory, if it is not there; else continued behind its last whole line.
        header: "model", "mode", "data" and "options" must be those of a file that is there; "made" need not.

    Raises:
        InputError: The file cannot be written, belongs to another run, or is no file of predictions; it is left alone.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.done = 0
        self._header = header
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BufferedRandom = path.open("r+b") if path.exists() else path.open("w+b")
        except OSError as error:
            raise InputError(f"cannot write {path} ({error.strerror}); pass another --output") from error
        try:
            self._open()
        except BaseException:
            self._file.close()
            raise

    def append(self, prediction: Prediction) -> None:
        """Write the next answer; it is there when this returns, whatever happens to the process.

        Raises:
            ValueError: It is not the next one.
            InputError: It cannot be written.
        """
        if prediction.index != self.done:
            raise ValueError(f"{self.path} holds {self.done} answers; the next is {self.done}, not {prediction.index}")
        try:
            lines = [] if self._file.tell() else [{"blockrag_predictions": _FORMAT, **self._header}]
            self._file.write(b"".join(map(_line, [*lines, prediction.to_json()])))
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"cannot write {self.path} ({error.strerror}); make room and run the same command again: the "
                f"{self.done} answers that are there stay"
            ) from error
        self.done += 1

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        # What could not be written was said by `append`; the line that it cut off is dropped when the run goes on.
        with suppress(OSError):
            self._file.close()

    def __enter__(self) -> Predictions:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        end = 0
        for number, data in enumerate(self._file):
            if not data.endswith(b"\n"):
                # Cut off when the run was killed; what no run began is somebody else's.
                if number == 0 and not (data.startswith(_BEGINNING) or _BEGINNING.startswith(data)):
                    raise _no_header(self.path, data)
                break
            if number == 0:
                _check_header(self.path, data, self._header)
            else:
                found = _parsed(self.path, number + 1, data)
                if found.index != self.done:
                    raise InputError(
                        f"{self.path}, line {number + 1}: holds answer {found.index}, not {self.done}; "
                        "pass another --output, or delete the file to begin anew"
                    )
                self.done += 1
            end += len(data)
        if self._file.seek(0, SEEK_END) != end:
            self._file.truncate(end)
        self._file.seek(end)


def read_predictions(path: str | Path) -> tuple[dict[str, Any], list[Prediction]]:
    """The header and the answers of a file; a line that was cut off is left out.

    Raises:
        DataError: The file cannot be read, or is no file of predictions.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); pass a file that `blockrag eval` wrote") from error
    if not lines:
        raise DataError(f"{path} is empty; pass a file that `blockrag eval` wrote")
    return _header(path, lines[0]), [_parsed(path, number, data) for number, data in enumerate(lines[1:], start=2)]


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _check_header(path: Path, data: bytes, header: Mapping[str, Any]) -> None:
    found = _header(path, data)
    # What was written and read again: tuples have become lists.
    wanted: dict[str, Any] = json.loads(json.dumps(header))
    for part in _COMPARED:
        if found.get(part) != wanted.get(part):
            raise InputError(
                f"{path} holds answers with another {part} ({_difference(found.get(part), wanted.get(part))}); "
                "pass another --output, or delete the file to begin anew"
            )


def _difference(found: object, wanted: object) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        names: Sequence[str] = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
        return "; ".join(f"{name} {found.get(name)!r:.80} there, {wanted.get(name)!r:.80} now" for name in names)
    return f"{found!r:.80} there, {wanted!r:.80} now"


def _header(path: Path, data: bytes) -> dict[str, Any]:
    try:
        header = json.loads(data)
        if header["blockrag_predictions"] == _FORMAT:
            return dict(header)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise _no_header(path, data)


def _no_header(path: Path, data: bytes) -> DataError:
    return DataError(
        f"{path}, line 1: not the header of predictions ({data[:60]!r}); pass a file `blockrag eval` wrote, or another "
        "--output"
    )


def _parsed(path: Path, number: int, data: bytes) -> Prediction:
    try:
        return Prediction.from_json(json.loads(data))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: not a prediction ({error}); delete the file to begin anew") from error
