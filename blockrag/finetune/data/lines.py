"""The one format of data files: JSON lines, each a training or evaluation line of one of three kinds.

    {"passages": [{"title", "text"}, ...], "question", "answers": [...]}     a RAG question
    {"passages": [...], "questions": [{"question", "answers"}, ...]}         several questions about the same passages
    {"blocks": [...], "response"}                                            a prompt that is already cut into blocks
    {"messages": [{"role", "content"}, ...]}                                 a conversation

Optional fields: of a passage `id`, `score` (a retriever's) and `supports` (whether the data set marks it as evidence);
of a question `response` (what the model is to write; by default the first answer), `kind` (questions of one kind are
reported together) and `id`; of a line `id`; beside `blocks` the whole `prompt`, which must be their join. Other fields
are refused: a misspelled one would silently change what is trained.

The second form is what makes training cheap: the questions become independent final blocks of one sequence.

Everything here names the file and the line in its errors. Nothing here knows tokens or models.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from blockrag.errors import DataError, InputError
from blockrag.passage import Passage, refuse_lone_surrogates

__all__ = [
    "BYTE_ORDER_MARK",
    "BlocksLine",
    "Candidate",
    "ChatLine",
    "Line",
    "Question",
    "RagLine",
    "dump_line",
    "line_to_json",
    "parse_candidate",
    "parse_json",
    "parse_line",
    "parse_question",
    "read_lines",
    "read_rag_lines",
    "refuse_special_file",
    "scan_lines",
    "write_lines",
]

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A passage given to a question.

    Args:
        passage: The passage; its id is the data set's, or its number within the line.
        score: What a retriever gave it, None if none did.
        supports: Whether the data set marks it as evidence, None where it does not say.
    """

    passage: Passage
    score: float | None = None
    supports: bool | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """One question about the passages of a line.

    Args:
        question: The question.
        answers: What counts as right; at least one.
        response: What the model is to write; empty for the first answer.
        kind: Questions of one kind are reported together ("fact", "order", "bridge", ...); may be empty.
        id: The data set's; may be empty.
    """

    question: str
    answers: tuple[str, ...]
    response: str = ""
    kind: str = ""
    id: str = ""

    @property
    def target(self) -> str:
        """What the model is trained to write."""
        return self.response or self.answers[0]


@dataclass(frozen=True, slots=True)
class RagLine:
    """Passages in prompt order, and at least one question about them."""

    passages: tuple[Candidate, ...]
    questions: tuple[Question, ...]
    id: str = ""


@dataclass(frozen=True, slots=True)
class BlocksLine:
    """A prompt as blocks, the last one global, and the response to it."""

    blocks: tuple[str, ...]
    response: str
    id: str = ""


@dataclass(frozen=True, slots=True)
class ChatLine:
    """A conversation that ends with an assistant message; every assistant message is trained."""

    messages: tuple[Mapping[str, str], ...]
    id: str = ""


Line: TypeAlias = RagLine | BlocksLine | ChatLine


def read_lines(path: str | Path) -> Iterator[tuple[int, Line]]:
    """Read a data file, line by line.

    Yields:
        The number of each line that is not blank, counted from 1, and the line.

    Raises:
        DataError: The file cannot be read, holds no line, or a line is malformed; names the file and the line.
    """
    for number, line in scan_lines(path):
        if isinstance(line, DataError):
            raise line
        yield number, line


def scan_lines(path: str | Path) -> Iterator[tuple[int, Line | DataError]]:
    """`read_lines` that goes on behind a malformed line, for those who want to see all of them.

    Yields:
        The number of each line that is not blank, and the line or what is wrong with it.

    Raises:
        DataError: The file cannot be read, or holds no line.
    """
    path = Path(path)
    found = False
    try:
        with path.open("rb") as file:
            for number, data in enumerate(file, start=1):
                if data.removeprefix(BYTE_ORDER_MARK).strip():
                    found = True
                    yield number, _scanned(data, f"{path}, line {number}")
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); pass a file of JSON lines") from error
    if not found:
        raise DataError(f"{path} holds no lines; see `blockrag data` for what makes one")


def read_rag_lines(path: str | Path) -> Iterator[tuple[int, RagLine]]:
    """`read_lines`, for uses that need passages and questions.

    Raises:
        DataError: See `read_lines`; or a line is a conversation or ready blocks.
    """
    for number, line in read_lines(path):
        if not isinstance(line, RagLine):
            raise DataError(
                f"{path}, line {number}: needs passages and a question, got "
                f"{'messages' if isinstance(line, ChatLine) else 'blocks'}; leave such lines out here"
            )
        yield number, line


def parse_json(data: bytes, where: str) -> object:
    """The value of a line of JSON, strictly: no NaN, no Infinity; a byte order mark is dropped.

    Raises:
        DataError: It is not JSON.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(data.removeprefix(BYTE_ORDER_MARK).decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}); write one object per line") from error


def parse_line(fields: object, where: str) -> Line:
    """One line from its JSON value.

    Args:
        fields: The parsed JSON.
        where: What errors call the line, e.g. "train.jsonl, line 3".

    Raises:
        DataError: It is not of one of the three kinds, or a field is malformed.
    """
    if not isinstance(fields, dict):
        raise DataError(f"{where}: a JSON {type(fields).__name__}, not an object; write one object per line")
    if "passages" in fields:
        return _rag_line(fields, where)
    if "blocks" in fields:
        return _blocks_line(fields, where)
    if "messages" in fields:
        return _chat_line(fields, where)
    raise DataError(
        f"{where}: has the fields {sorted(fields)}; a line needs passages with a question and answers, "
        "or blocks with a response, or messages"
    )


def write_lines(path: str | Path, lines: Iterable[Line]) -> int:
    """Write a data file; it appears whole or not at all.

    Returns:
        How many lines were written.

    Raises:
        DataError: There is no line, or the file cannot be written.
    """
    path = Path(path)
    count = 0
    try:
        refuse_special_file(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                for line in lines:
                    file.write(dump_line(line))
                    count += 1
            if not count:
                raise DataError(f"there is nothing to write to {path}; every line was left out")
            # Temporary files are private; this one is to be what any other new file is.
            mask = os.umask(0)
            os.umask(mask)
            Path(name).chmod(0o666 & ~mask)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DataError(f"cannot write {path} ({error.strerror}); pass another path") from error
    return count


def refuse_special_file(path: Path) -> None:
    """Check, before there is work to lose, that an output is no directory, device or pipe: writing would replace it.

    Raises:
        DataError: It is one.
        OSError: It cannot be looked at.
    """
    if path.exists() and not path.is_file():
        raise DataError(f"cannot write {path} (not a regular file); pass the name of a file")


def dump_line(line: Line) -> str:
    """A line as it stands in a file, with its line end."""
    return json.dumps(line_to_json(line), ensure_ascii=False) + "\n"


def line_to_json(line: Line) -> dict[str, object]:
    """A line as JSON types; `parse_line` reads it back."""
    own: dict[str, object] = {"id": line.id} if line.id else {}
    if isinstance(line, ChatLine):
        return {**own, "messages": [dict(message) for message in line.messages]}
    if isinstance(line, BlocksLine):
        return {**own, "blocks": list(line.blocks), "response": line.response}
    passages = [_candidate_to_json(candidate) for candidate in line.passages]
    questions = [_question_to_json(question) for question in line.questions]
    # An id beside a single question is the question's.
    if len(questions) == 1 and not own:
        return {"passages": passages, **questions[0]}
    return {**own, "passages": passages, "questions": questions}


def _scanned(data: bytes, where: str) -> Line | DataError:
    try:
        return parse_line(parse_json(data, where), where)
    except DataError as error:
        return error


def _rag_line(fields: Mapping[str, Any], where: str) -> RagLine:
    passages = fields["passages"]
    if not isinstance(passages, list):
        raise DataError(f"{where}: passages is a {type(passages).__name__}; pass a list of objects with a text")
    if "questions" in fields:
        _known(fields, {"passages", "questions", "id"}, where)
        raw = fields["questions"]
        if not isinstance(raw, list) or not raw:
            raise DataError(f"{where}: questions must be a list with at least one object, got {raw!r:.60}")
        questions = tuple(
            parse_question(item, f"{where}, question {number}") for number, item in enumerate(raw, start=1)
        )
        own_id = _text(fields, "id", where, default="")
    else:
        _known(fields, {"passages", "question", "answers", "response", "kind", "id"}, where)
        questions = (parse_question({name: value for name, value in fields.items() if name != "passages"}, where),)
        own_id = ""
    candidates = tuple(parse_candidate(item, number, where) for number, item in enumerate(passages, start=1))
    return RagLine(passages=candidates, questions=questions, id=own_id)


def parse_question(fields: object, where: str) -> Question:
    """A question from its JSON value; see `parse_line`.

    Raises:
        DataError: A field is malformed.
    """
    if not isinstance(fields, dict):
        raise DataError(f"{where}: a question must be an object, got {fields!r:.60}")
    _known(fields, {"question", "answers", "response", "kind", "id"}, where)
    answers = fields.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise DataError(f"{where}: answers must be a list of at least one non-empty string, got {answers!r:.60}")
    refuse_lone_surrogates(where, {f"answer {number}": text for number, text in enumerate(answers, start=1)}, DataError)
    return Question(
        question=_text(fields, "question", where),
        answers=tuple(answers),
        response=_text(fields, "response", where, default=""),
        kind=_text(fields, "kind", where, default=""),
        id=_text(fields, "id", where, default=""),
    )


def parse_candidate(fields: object, number: int, where: str) -> Candidate:
    """The passage of this number in its line from its JSON value; see `parse_line`.

    Raises:
        DataError: A field is malformed.
    """
    where = f"{where}, passage {number}"
    if not isinstance(fields, dict):
        raise DataError(f"{where}: must be an object with a text, got {fields!r:.60}")
    _known(fields, {"title", "text", "id", "score", "supports"}, where)
    score, supports = fields.get("score"), fields.get("supports")
    if score is not None and not _is_number(score):
        raise DataError(f"{where}: score must be a finite number, got {score!r:.60}")
    if supports is not None and not isinstance(supports, bool):
        raise DataError(f"{where}: supports must be true or false, got {supports!r:.60}")
    try:
        passage = Passage(
            id=_text(fields, "id", where, default="") or str(number),
            title=_text(fields, "title", where, default=""),
            text=_text(fields, "text", where),
        )
    except DataError:
        raise
    except InputError as error:
        raise DataError(f"{where}: {error}") from error
    return Candidate(passage, None if score is None else float(score), supports)


def _blocks_line(fields: Mapping[str, Any], where: str) -> BlocksLine:
    _known(fields, {"blocks", "response", "prompt", "id"}, where)
    blocks = _strings(fields["blocks"], "blocks", where)
    if "prompt" in fields and fields["prompt"] != "".join(blocks):
        raise DataError(f"{where}: the prompt is not the join of its blocks; correct one of them or leave it out")
    return BlocksLine(
        blocks=blocks, response=_text(fields, "response", where), id=_text(fields, "id", where, default="")
    )


def _chat_line(fields: Mapping[str, Any], where: str) -> ChatLine:
    _known(fields, {"messages", "id"}, where)
    messages = fields["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages must be a list of objects with role and content, got {messages!r:.60}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or set(message) != {"role", "content"} or message["role"] not in _ROLES:
            raise DataError(
                f"{where}, message {number}: must hold a role ({', '.join(_ROLES)}) and a content, got {message!r:.80}"
            )
        _text(message, "content", f"{where}, message {number}", default=None if message["role"] != "system" else "")
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: ends with a {messages[-1]['role']} message; there is no answer to train")
    return ChatLine(messages=tuple(dict(message) for message in messages), id=_text(fields, "id", where, default=""))


def _text(fields: Mapping[str, Any], name: str, where: str, *, default: str | None = None) -> str:
    """A string of the line; one without a default must be there and not be blank."""
    value = fields.get(name, default)
    if not isinstance(value, str) or (default is None and not value.strip()):
        raise DataError(f"{where}: {name} must be a {'' if default == '' else 'non-empty '}string, got {value!r:.60}")
    refuse_lone_surrogates(where, {name: value}, DataError)
    return value


def _is_number(value: object) -> bool:
    """Whether a JSON value is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _strings(value: object, name: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise DataError(f"{where}: {name} must be a list of at least one string, got {value!r:.60}")
    refuse_lone_surrogates(where, {f"{name} {number}": text for number, text in enumerate(value, start=1)}, DataError)
    if not value[-1].strip():
        raise DataError(f"{where}: the last of the {name} is empty; it must hold the question")
    return tuple(value)


def _known(fields: Mapping[str, Any], known: set[str], where: str) -> None:
    if unknown := sorted(set(fields) - known):
        raise DataError(f"{where}: unknown fields {unknown}; known here are {sorted(known)}")


def _candidate_to_json(candidate: Candidate) -> dict[str, object]:
    passage = candidate.passage
    fields: dict[str, object] = {"id": passage.id, "title": passage.title, "text": passage.text}
    fields |= {} if candidate.score is None else {"score": candidate.score}
    return fields | ({} if candidate.supports is None else {"supports": candidate.supports})


def _question_to_json(question: Question) -> dict[str, object]:
    fields: dict[str, object] = {"question": question.question, "answers": list(question.answers)}
    optional: Sequence[str] = ("response", "kind", "id")
    return fields | {name: getattr(question, name) for name in optional if getattr(question, name)}
