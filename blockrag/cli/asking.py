"""`blockrag query` and `blockrag chat`: questions to an index that is there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from blockrag.cli.answers import answer_json, sources_table, usage_line
from blockrag.cli.directory import open_rag
from blockrag.cli.options import (
    AsJson,
    AttentionOption,
    Encoder,
    IndexPath,
    MaxNewTokens,
    Model,
    OnMissChoice,
    OnMissOption,
    Seed,
    Temperature,
    TopK,
    attention_of,
    generation_options,
)
from blockrag.cli.output import PARTLY_FAILED, Output, reporting
from blockrag.errors import InputError, MissingBlockError, PromptTooLongError

if TYPE_CHECKING:
    from blockrag.model.sampling import GenerationOptions
    from blockrag.model.stream import ResultStream
    from blockrag.rag import Answer, BlockRAG, Chat

__all__ = ["chat", "query"]

Question = Annotated[str, typer.Argument(metavar="QUESTION", help="The question.")]
Stream = Annotated[
    bool | None,
    typer.Option("--stream/--no-stream", help="Print the answer as it comes; by default on a terminal."),
]


def query(
    question: Question,
    path: IndexPath,
    model: Model = None,
    encoder: Encoder = None,
    top_k: TopK = 5,
    attention: AttentionOption = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    on_miss: OnMissOption = OnMissChoice.compute,
    stream: Stream = None,
    as_json: AsJson = False,
) -> None:
    """Answer one question, with its sources.

    Prints the answer, the passages it was given with their scores, and what was reused, computed and how long it took.
    """
    with reporting(as_json) as out:
        if not question.strip():
            raise InputError(f"the question is empty ({question!r}); pass the text to answer")
        options = generation_options(max_new_tokens, temperature, seed)
        opened = open_rag(out, path, model=model, encoder=encoder, attention=attention_of(attention), top_k=top_k)
        with opened as rag:
            answer = _print_answer(out, rag.stream(question, options, on_miss=on_miss.value), streamed=stream)
            if answer.hits:
                out.show("", sources_table(answer.hits))
            else:
                out.show("", "no passage was found")
            out.show("", usage_line(answer))
            out.result(answer_json(question, answer, rag.model.attention))


def chat(
    path: IndexPath,
    model: Model = None,
    encoder: Encoder = None,
    top_k: TopK = 5,
    attention: AttentionOption = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    on_miss: OnMissOption = OnMissChoice.compute,
    stream: Stream = None,
    as_json: AsJson = False,
) -> None:
    """Hold a conversation over an index.

    One question per line of standard input, until it ends. Passages and answers stay in the model's cache, so each
    question brings only what is new. A conversation that has grown too long for the model is started anew.
    """
    with reporting(as_json) as out:
        options = generation_options(max_new_tokens, temperature, seed)
        opened = open_rag(out, path, model=model, encoder=encoder, attention=attention_of(attention), top_k=top_k)
        with opened as rag, _Conversation(out, rag, options, stream, on_miss) as conversation:
            for question in _questions(out):
                conversation.ask(question)
            out.result({"turns": conversation.turns})


@dataclass(slots=True)
class _Conversation:
    """Turns, and the conversation they belong to; another one begins when the model's room is used up."""

    out: Output
    rag: BlockRAG
    options: GenerationOptions
    streamed: bool | None
    on_miss: OnMissChoice
    turns: list[dict[str, object]] = field(default_factory=list)
    _chat: Chat | None = None
    _answered: int = 0

    def __enter__(self) -> _Conversation:
        return self

    def __exit__(self, *details: object) -> None:
        self._close()

    def ask(self, question: str) -> None:
        try:
            answer = self._answer(question)
        except (InputError, MissingBlockError) as error:
            self.out.exit_code = PARTLY_FAILED
            self.out.error(str(error))
            self.turns.append({"question": question, "error": str(error)})
            self._close()
            return
        self._answered += 1
        self.out.show(*([sources_table(answer.hits)] if answer.hits else []), usage_line(answer), "")
        turn = {**answer_json(question, answer, self.rag.model.attention), "new_conversation": self._answered == 1}
        self.turns.append(turn)

    def _answer(self, question: str) -> Answer:
        try:
            return self._turn(question)
        except PromptTooLongError:
            if not self._answered:
                raise
            self.out.note("note: the conversation is as long as the model can place; starting a new one")
            self._close()
            return self._turn(question)

    def _turn(self, question: str) -> Answer:
        if self._chat is None:
            self._chat = self.rag.chat(on_miss=self.on_miss.value)
        return _print_answer(self.out, self._chat.stream(question, self.options), streamed=self.streamed)

    def _close(self) -> None:
        if self._chat is not None:
            self._chat.close()
        self._chat, self._answered = None, 0


def _print_answer(out: Output, stream: ResultStream[str, Answer], *, streamed: bool | None) -> Answer:
    """Print an answer, piece by piece or at its end, without the white space around it."""
    if not (out.is_terminal if streamed is None else streamed):
        answer = stream.finish()
        out.show(answer.text)
        return answer
    begun, held = False, ""
    try:
        for piece in stream:
            text = held + (piece if begun else piece.lstrip())
            shown = text.rstrip()
            begun, held = begun or bool(shown), text[len(shown) :]
            out.piece(shown)
    finally:
        out.piece("\n")
    return stream.result


def _questions(out: Output) -> Iterator[str]:
    """The lines of standard input that are not blank; a prompt where somebody types them."""
    typed = sys.stdin.isatty()
    if typed:
        out.note("one question per line; end with Ctrl-D")
    while True:
        if typed:
            out.messages.print("> ", end="", style="bold")
        line = sys.stdin.readline()
        if not line:
            return
        if question := line.strip():
            if not typed:
                out.show(f"> {question}")
            yield question
