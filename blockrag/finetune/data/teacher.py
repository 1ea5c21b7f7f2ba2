"""Responses written by a model: what the trained model is to say, in place of the bare answer.

The published data was answered by a large instruction model over the same passages. A teacher here is a `BlockModel`,
which is asked in its own template, or a server that speaks the OpenAI API, which is asked in the one wording of
`rag_messages`. Answering thousands of questions takes hours, so the output grows line by line and a run that was
killed goes on behind its last whole line.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedRandom
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from blockrag.errors import DataError, InputError, MissingDependencyError, PromptTooLongError
from blockrag.evaluation.metrics import substring_match
from blockrag.finetune.data.lines import (
    Question,
    RagLine,
    dump_line,
    parse_json,
    parse_line,
    read_rag_lines,
    refuse_special_file,
)
from blockrag.finetune.data.ranking import split_questions
from blockrag.prompt import TEMPLATES
from blockrag.prompt.registry import INSTRUCTION, SYSTEM

if TYPE_CHECKING:
    from openai import OpenAI

    from blockrag.model.block_model import Attention, BlockModel
    from blockrag.model.sampling import GenerationOptions

__all__ = [
    "AnswerReport",
    "ModelTeacher",
    "ServedTeacher",
    "Teacher",
    "WithoutAnswer",
    "answer_file",
    "rag_messages",
]

logger = logging.getLogger(__name__)

_CHECK_ADDRESS = "check the address, which has a /v1 at most servers"

WithoutAnswer = Literal["keep", "gold", "drop"]
"""What becomes of a response that holds none of the answers: it is kept, the first answer takes its place, or the
question is dropped. An empty response cannot be kept: its question is dropped."""


class Teacher(Protocol):
    """Writes responses."""

    def respond(self, lines: Iterable[RagLine]) -> Iterator[str]:
        """A response to each line, in order; empty where the teacher refuses the line.

        Args:
            lines: Lines with one question each; read only as far ahead as the teacher works.
        """
        ...


class _Refusals:
    """Says why the first refused question was: what is wrong with all of them must not pass for an opinion of some."""

    def __init__(self, who: str) -> None:
        self._who, self._said = who, False

    def note(self, line: RagLine, reason: Exception) -> None:
        if not self._said:
            logger.warning("%s refuses %r: %s", self._who, line.questions[0].question, reason)
        self._said = True


class ModelTeacher:
    """A `BlockModel` as the teacher; it sees the prompt it would see at inference.

    Args:
        model: The model.
        options: How to generate.
        attention: "block" or "full"; None for the model's own.
        batch_size: Questions answered together.
    """

    def __init__(
        self,
        model: BlockModel,
        options: GenerationOptions,
        *,
        attention: Attention | None = None,
        batch_size: int = 16,
    ) -> None:
        self._model, self._options, self._attention = model, options, attention
        self._batch_size = batch_size
        self._refusals = _Refusals("the model")

    def respond(self, lines: Iterable[RagLine]) -> Iterator[str]:
        """See `Teacher`; a prompt that is too long for the model is refused."""
        lines = iter(lines)
        while batch := list(islice(lines, self._batch_size)):
            try:
                yield from self._generate(batch)
            except PromptTooLongError:
                for line in batch:
                    yield self._alone(line)

    def _alone(self, line: RagLine) -> str:
        try:
            return self._generate([line])[0]
        except PromptTooLongError as refusal:
            self._refusals.note(line, refusal)
            return ""

    def _generate(self, lines: Sequence[RagLine]) -> list[str]:
        prompts = [
            self._model.template.segment(
                self._model.tokenizer,
                passages=[candidate.passage for candidate in line.passages],
                question=line.questions[0].question,
            )
            for line in lines
        ]
        found = self._model.generate(prompts, self._options, attention=self._attention, batch_size=self._batch_size)
        return [one.text.strip() for one in found]


class ServedTeacher:
    """A server that speaks the OpenAI API as the teacher.

    Args:
        base_url: Its address, with the `/v1` where it has one.
        model: The model's name there.
        api_key: Its key; servers of one's own often want none.
        max_tokens: Most tokens of a response.
        temperature: 0 for greedy decoding.
        seed: Passed on where it is given; servers that heed it repeat themselves.
        concurrency: Requests under way at once.
        max_retries: How often the client repeats a request that failed for a passing reason.

    Raises:
        MissingDependencyError: The openai package is not installed.
        InputError: `concurrency` is below 1, or the key cannot be sent.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str = "none",
        max_tokens: int = 200,
        temperature: float = 0.0,
        seed: int | None = None,
        concurrency: int = 8,
        max_retries: int = 5,
    ) -> None:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise MissingDependencyError(
                "a teacher behind an address is asked with the openai package; install it with: "
                "pip install 'blockrag[data]'"
            ) from error
        if concurrency < 1:
            raise InputError(f"concurrency must be at least 1, got {concurrency}")
        if not (api_key.isascii() and api_key.isprintable()):
            raise InputError("the key holds characters that no request can carry; pass it again, ASCII and on one line")
        self._client: OpenAI = OpenAI(base_url=base_url, api_key=api_key, max_retries=max_retries)
        self._base_url, self._model = base_url, model
        self._max_tokens, self._temperature, self._seed = max_tokens, temperature, seed
        self._concurrency = concurrency
        self._refusals = _Refusals(f"the teacher {model!r}")

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def respond(self, lines: Iterable[RagLine]) -> Iterator[str]:
        """See `Teacher`; a request that the server calls bad (too long, filtered) is refused.

        Raises:
            InputError: The server cannot be reached, refuses to serve at all, or does not speak the OpenAI API.
        """
        waiting: deque[tuple[RagLine, Future[str]]] = deque()
        pool = ThreadPoolExecutor(self._concurrency, thread_name_prefix="teacher")
        try:
            for line in lines:
                waiting.append((line, pool.submit(self._ask, line)))
                # One answer that takes long must not leave the other threads without work.
                if len(waiting) >= 2 * self._concurrency:
                    yield self._response(*waiting.popleft())
            while waiting:
                yield self._response(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _response(self, line: RagLine, answer: Future[str]) -> str:
        import openai

        try:
            return answer.result()
        except (openai.BadRequestError, openai.UnprocessableEntityError) as refusal:
            self._refusals.note(line, refusal)
            return ""

    def _ask(self, line: RagLine) -> str:
        import openai
        from openai.types.chat import ChatCompletion

        try:
            completion = self._client.chat.completions.create(
                model=self._model,
                messages=rag_messages(line),  # type: ignore[arg-type]
                max_tokens=self._max_tokens,
                temperature=self._temperature,
                seed=openai.omit if self._seed is None else self._seed,
            )
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            raise
        except openai.OpenAIError as error:
            raise InputError(
                f"the teacher {self._model!r} at {self._base_url} does not answer ({type(error).__name__}: {error}); "
                "check address, model and key, and run the same command again: it goes on from here"
            ) from error
        except ValueError as error:
            raise InputError(f"{self._base_url} answers with broken JSON ({error}); {_CHECK_ADDRESS}") from error
        # The client takes whatever it is sent; what a filter swallowed has no choices, or no text.
        choices = completion.choices if isinstance(completion, ChatCompletion) else None
        if not isinstance(choices, list):
            sent = completion.to_dict() if isinstance(completion, ChatCompletion) else completion
            shown = " ".join(str(sent).split())
            raise InputError(f"{self._base_url} answers with no chat completion: {shown:.120}; {_CHECK_ADDRESS}")
        message = choices[0].message if choices else None
        return ((message.content if message else None) or "").strip()


def rag_messages(line: RagLine) -> list[dict[str, str]]:
    """The RAG prompt as messages: the published system text, then the documents and the published instruction.

    Args:
        line: A line with one question.
    """
    form = TEMPLATES["tulu"]
    documents = "".join(
        (form.passage if one.passage.title.strip() else form.passage_untitled).format(
            title=one.passage.title.strip(), text=one.passage.text.strip()
        )
        for one in line.passages
    )
    question = INSTRUCTION.format(question=line.questions[0].question.strip())
    return [
        {"role": "system", "content": SYSTEM.strip()},
        {"role": "user", "content": f"{documents}\n{question}"},
    ]


@dataclass(slots=True)
class AnswerReport:
    """What a run did; all but `lines_before` count questions.

    Args:
        lines_before: Lines that the output had already.
        responses: Responses written as the teacher gave them.
        with_answer: How many of these hold an answer.
        replaced: Responses that the first answer took the place of.
        dropped: Questions left out, because of what the response lacks or because there is none.
        without_response: How many of those replaced or dropped had none: refused by the teacher, or empty.
    """

    lines_before: int = 0
    responses: int = 0
    with_answer: int = 0
    replaced: int = 0
    dropped: int = 0
    without_response: int = 0


def answer_file(
    source: str | Path,
    target: str | Path,
    teacher: Teacher,
    *,
    without_answer: WithoutAnswer = "keep",
    progress: Callable[[AnswerReport], None] = lambda report: None,
) -> AnswerReport:
    """Write the lines of a file with a teacher's responses.

    Args:
        source: RAG lines.
        target: Continued if it is there. A line none of whose questions is left is left out.
        teacher: Who responds.
        without_answer: What becomes of responses that hold no answer, by Substr-EM.
        progress: Called with the counts so far after each line.

    Raises:
        DataError: The source is malformed, the target cannot be written or holds something else, or no question is
            left.
        InputError: Source and target are one file, or the teacher does not answer. What was written stays.
    """
    source, target = Path(source), Path(target)
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(f"the responses would overwrite {source}, which they answer; pass another output")
    lines = (line for _, line in read_rag_lines(source))
    report = AnswerReport()
    with _continued(source, target, lines, report) as file, _gone_if_empty(target, file):
        for line, responses in _answered(lines, teacher):
            kept = _kept(line, responses, without_answer, report)
            if kept is not None:
                _append(target, file, kept)
            progress(report)
        if not file.tell():
            raise DataError(f"there is nothing to write to {target}; every question was dropped")
    return report


def _answered(lines: Iterator[RagLine], teacher: Teacher) -> Iterator[tuple[RagLine, list[str]]]:
    """Each line with the responses to its questions; the teacher may work several lines ahead."""
    begun: deque[RagLine] = deque()

    def questions() -> Iterator[RagLine]:
        for line in lines:
            begun.append(line)
            yield from split_questions(line)

    responses: list[str] = []
    for response in teacher.respond(questions()):
        responses.append(response)
        if len(responses) == len(begun[0].questions):
            yield begun.popleft(), responses
            responses = []


def _kept(line: RagLine, responses: Sequence[str], policy: WithoutAnswer, report: AnswerReport) -> RagLine | None:
    questions: list[Question] = []
    for question, response in zip(line.questions, responses, strict=True):
        holds = substring_match(response, question.answers)
        report.without_response += not response
        if response and (holds or policy == "keep"):
            report.responses += 1
            report.with_answer += holds
            questions.append(replace(question, response=response))
        elif policy == "gold":
            report.replaced += 1
            questions.append(replace(question, response=""))
        else:
            report.dropped += 1
    return replace(line, questions=tuple(questions)) if questions else None


def _continued(source: Path, target: Path, lines: Iterator[RagLine], report: AnswerReport) -> BufferedRandom:
    """Open the target behind its last whole line, with the source's lines read past those that are done."""
    try:
        refuse_special_file(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        file = target.open("r+b") if target.exists() else target.open("w+b")
    except OSError as error:
        raise DataError(f"cannot write {target} ({error.strerror}); pass another output") from error
    try:
        end = 0
        for number, data in enumerate(file, start=1):
            where = f"{target}, line {number}"
            cut_off = not data.endswith(b"\n")
            if cut_off:
                # By the end of a killed run, or it is a file of somebody else's that must not be touched.
                ours = any(_begins(data, line) for _, line in read_rag_lines(source))
            else:
                done = parse_line(parse_json(data, where), where)
                # Lines that are not in the target were dropped.
                ours = any(_answers(done, line) for line in lines)
            if not ours:
                raise DataError(
                    f"{where}: does not answer what the source asks there; pass another output, or delete this one to "
                    "begin anew"
                )
            if cut_off:
                break
            end += len(data)
            report.lines_before += 1
        file.truncate(end)
        file.seek(end, os.SEEK_SET)
    except BaseException:
        file.close()
        raise
    return file


@contextmanager
def _gone_if_empty(target: Path, file: BufferedRandom) -> Iterator[None]:
    """A run that wrote nothing leaves nothing."""
    try:
        yield
    finally:
        if not file.seek(0, os.SEEK_END):
            target.unlink()


def _append(target: Path, file: BufferedRandom, line: RagLine) -> None:
    try:
        file.write(dump_line(line).encode())
        file.flush()
    except OSError as error:
        raise DataError(
            f"cannot write {target} ({error.strerror}); make room and run the same command again"
        ) from error


def _begins(piece: bytes, line: RagLine) -> bool:
    """Whether a piece of a file is what a line begins with, whatever it was answered: its passages, as they stand."""
    head = dump_line(replace(line, questions=())).encode().removesuffix(b', "questions": []}\n')
    return piece.startswith(head) or head.startswith(piece)


def _answers(done: object, line: RagLine) -> bool:
    """Whether a line of the target is that line of the source, answered; some of its questions may be dropped."""
    if not isinstance(done, RagLine) or (done.passages, done.id) != (line.passages, line.id):
        return False
    asked = iter(replace(question, response="") for question in line.questions)
    return all(replace(question, response="") in asked for question in done.questions)
