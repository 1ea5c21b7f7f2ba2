"""`blockrag data`: data sets to training and evaluation files, one step a command."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from enum import Enum
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockrag.cli.directory import built_with, model_name
from blockrag.cli.options import (
    AsJson,
    AttentionOption,
    Device,
    Dtype,
    MaxNewTokens,
    Seed,
    Temperature,
    attention_of,
    generation_options,
)
from blockrag.cli.output import EXIT_CODES, PARTLY_FAILED, Output, quiet_transformers, reporting
from blockrag.errors import InputError

if TYPE_CHECKING:
    from blockrag.encoders import Encoder
    from blockrag.finetune.data.checking import FileReport, Spread
    from blockrag.finetune.data.lines import Line, RagLine
    from blockrag.finetune.data.teacher import AnswerReport, Teacher
    from blockrag.index import PassageIndex

__all__ = ["data"]

_QUESTIONS_PER_NOTE = 100
_LINES_SHOWN = 20

data = typer.Typer(
    no_args_is_help=True,
    help="""Make training and evaluation files from data sets, step by step.

    read -> rerank or retrieve -> sample -> merge -> answer, and check at any point. Every file is JSON lines of
    {"passages", "question", "answers"}, {"blocks", "response"} or {"messages"}; docs/guide/data.md shows them.
    Outputs appear whole or not at all; only answer continues a file that is there.
    """,
    epilog=EXIT_CODES,
)


class Source(str, Enum):
    """The data sets that can be read: those of `finetune.data.sources`, which is not imported for --help."""

    twowiki = "2wiki"
    hotpotqa = "hotpotqa"
    musique = "musique"
    nq = "nq"
    triviaqa = "triviaqa"
    squad = "squad"
    chat = "chat"


class OrderChoice(str, Enum):
    """How the passages of a question are ordered."""

    best_first = "best-first"
    best_last = "best-last"
    given = "given"


class FoundOrder(str, Enum):
    """How passages that were found are ordered."""

    best_first = "best-first"
    best_last = "best-last"


class WithoutAnswerChoice(str, Enum):
    """What becomes of a response without an answer in it."""

    keep = "keep"
    gold = "gold"
    drop = "drop"


Input = Annotated[Path, typer.Argument(metavar="INPUT", help="A data file.")]
OutputFile = Annotated[Path, typer.Option("--output", "-o", help="The file to write.")]
Passages = Annotated[int, typer.Option("-k", "--top-k", min=1, help="Passages per question.")]
EncoderOption = Annotated[
    str,
    typer.Option("--encoder", help="'lexical', 'contriever' (what the published data was ranked with) or 'st:MODEL'."),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Makes the choice repeatable.")]


@data.command("read", epilog=EXIT_CODES)
def read(
    source: Annotated[
        Source, typer.Argument(metavar="SOURCE", help=f"One of {', '.join(one.value for one in Source)}.")
    ],
    paths: Annotated[list[Path], typer.Argument(metavar="PATH", help="The set's own files, packed or not.")],
    output: OutputFile,
    sentence_separator: Annotated[
        str | None,
        typer.Option(
            help="Between the sentences of a paragraph; by default a space. '' makes the published data.",
            show_default=False,
        ),
    ] = None,
    gold: Annotated[
        int | None,
        typer.Option(min=1, help="squad: paragraphs per line that its questions are about.", show_default=False),
    ] = None,
    distractors: Annotated[
        int | None, typer.Option(min=0, help="squad: other paragraphs per line.", show_default=False)
    ] = None,
    same_article: Annotated[
        bool | None,
        typer.Option("--same-article", help="squad: take these from the same article first.", show_default=False),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="squad: of what is drawn; by default 42.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read a data set's own files.

    2wiki, hotpotqa, musique: JSON, JSON lines or parquet. nq, triviaqa: questions with ctxs, as FiD and DPR keep
    them. squad: SQuAD 1.1, 2.0, XQuAD; one line per paragraph with all its questions. chat: records with messages,
    such as Tulu 3's.
    """
    with reporting(as_json) as out:
        from blockrag.finetune.data.sources import SOURCES

        reader = SOURCES[source.value]
        options = {
            "sentence_separator": sentence_separator,
            "gold": gold,
            "distractors": distractors,
            "same_article": same_article,
            "seed": seed,
        }
        given = {name: value for name, value in options.items() if value is not None}
        for name in sorted(given.keys() - inspect.signature(reader).parameters.keys()):
            raise InputError(f"--{name.replace('_', '-')} means nothing for {source.value}; leave it out")
        left_out: Counter[str] = Counter()

        def note(reason: str) -> None:
            left_out[reason] += 1

        lines = chain.from_iterable(reader(path, left_out=note, **given) for path in paths)
        written = _write(out, output, lines)
        if written["without_passages"]:
            out.warning(
                f"{written['without_passages']:,} questions came without passages; blockrag data retrieve finds some"
            )
        if left_out:
            out.show("left out: " + ", ".join(f"{count:,} x {reason}" for reason, count in left_out.most_common()))
        out.result({"source": source.value, **written, "left_out": dict(left_out)})


@data.command("rerank", epilog=EXIT_CODES)
def rerank(
    source: Input,
    output: OutputFile,
    encoder: EncoderOption = "lexical",
    top_k: Passages = 10,
    order: Annotated[OrderChoice, typer.Option("--order", help="Of the passages kept.")] = OrderChoice.best_first,
    titles: Annotated[
        bool, typer.Option("--titles/--no-titles", help="Whether the encoder sees the passages' titles.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Rank each question's own passages; keep the best.

    Scores are kept. A line with several questions becomes one line for each. The published data: --encoder contriever
    -k 10.
    """
    with reporting(as_json) as out:
        opened = _encoder(out, encoder)
        from blockrag.finetune.data.ranking import rerank as reranked

        lines = reranked(_rag_lines(source), opened, top_k=top_k, order=order.value, titles=titles)
        out.result({"encoder": opened.name, **_write(out, output, lines)})


@data.command("retrieve", epilog=EXIT_CODES)
def retrieve(
    source: Input,
    output: OutputFile,
    index: Annotated[
        Path | None, typer.Option("--index", help="Directory of an index that `blockrag ingest` made.")
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option("--corpus", help="A file of passages: records with a text, title and id.")
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            "--encoder", help="Of --corpus: 'lexical' (default), 'contriever', 'st:MODEL'.", show_default=False
        ),
    ] = None,
    top_k: Passages = 10,
    order: Annotated[FoundOrder, typer.Option("--order", help="Of the passages.")] = FoundOrder.best_first,
    as_json: AsJson = False,
) -> None:
    """Give each question the passages that a corpus has for it.

    They take the place of any it came with, and are marked as supporting where they contain an answer.
    """
    with reporting(as_json) as out, _corpus(out, index, corpus, encoder) as searched:
        from blockrag.finetune.data.ranking import retrieve as retrieved

        counts: Counter[str] = Counter()

        def counted() -> Iterator[RagLine]:
            for line in retrieved(_rag_lines(source), searched, top_k=top_k, order=order.value):
                counts["with_support"] += any(one.supports for one in line.passages)
                yield line

        written = _write(out, output, counted())
        share = counts["with_support"] / written["questions"]
        out.show(f"{share:.1%} of the questions have an answer among their {top_k} passages")
        if written["without_passages"]:
            out.warning(f"{written['without_passages']:,} questions found nothing; they have no passages")
        out.result({**written, "with_support": counts["with_support"]})


@data.command("sample", epilog=EXIT_CODES)
def sample(
    source: Input,
    output: OutputFile,
    n: Annotated[int, typer.Option("-n", min=1, help="How many lines.")],
    seed: SeedOption = 42,
    as_json: AsJson = False,
) -> None:
    """Draw lines at random.

    The lines that Python's random.sample draws with this seed, in its order: 42, as in the published preparation.
    """
    with reporting(as_json) as out:
        from blockrag.finetune.data.mixing import sample_lines

        out.result(_write(out, output, sample_lines(source, n, seed=seed)))


@data.command("merge", epilog=EXIT_CODES)
def merge(
    sources: Annotated[list[Path], typer.Argument(metavar="INPUT", help="Data files.")],
    output: OutputFile,
    mix_chat: Annotated[
        Path | None, typer.Option("--mix-chat", help="A data file of conversations to draw from.", show_default=False)
    ] = None,
    chat_ratio: Annotated[float, typer.Option("--chat-ratio", help="Conversations per other line.")] = 1.0,
    shuffle: Annotated[bool, typer.Option("--shuffle/--no-shuffle", help="Or one file after the other.")] = True,
    seed: SeedOption = 42,
    as_json: AsJson = False,
) -> None:
    """Join files and shuffle their lines; with conversations among them if wanted.

    The order is that of Python's random.shuffle with this seed.
    """
    with reporting(as_json) as out:
        from blockrag.finetune.data.mixing import merge_lines

        lines = merge_lines(sources, seed=seed, shuffle=shuffle, chat=mix_chat, chat_ratio=chat_ratio)
        out.result(_write(out, output, lines))


@data.command("answer", epilog=EXIT_CODES)
def answer(
    source: Input,
    output: Annotated[Path, typer.Option("--output", "-o", help="A file that is there is continued.")],
    model: Annotated[
        str, typer.Option("--model", help="'demo', a hub id or a directory; with --base-url the model's name there.")
    ],
    base_url: Annotated[
        str | None,
        typer.Option("--base-url", help="Of a server that speaks the OpenAI API: http://.../v1.", show_default=False),
    ] = None,
    api_key: Annotated[
        str, typer.Option("--api-key", envvar="OPENAI_API_KEY", help="Of that server.", show_default=False)
    ] = "none",
    without_answer: Annotated[
        WithoutAnswerChoice,
        typer.Option(
            "--without-answer",
            help="A response in which no right answer is found: keep it, write the gold answer, or drop the question.",
        ),
    ] = WithoutAnswerChoice.keep,
    attention: AttentionOption = None,
    max_new_tokens: MaxNewTokens = 200,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions a local model answers together.")] = 16,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests to a server under way at once.")] = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Have a model write the responses to train on.

    A local model is asked in its own template, in full attention unless --attention says block; a server gets the
    published system text, the documents and the published instruction as messages. Lines the output has already are
    skipped, so a run that was killed goes on where it stopped. A question that the teacher refuses (a prompt too long
    for it) counts as one without an answer.
    """
    with reporting(as_json) as out, ExitStack() as stack:
        from blockrag.finetune.data.lines import read_rag_lines

        # Before a model is loaded: a file that is not there needs none.
        next(read_rag_lines(source))
        teacher: Teacher
        options = generation_options(max_new_tokens, temperature, seed)
        if base_url is None:
            with out.working(f"loading {model} ..."):
                from blockrag.finetune.data.teacher import ModelTeacher
                from blockrag.model.block_model import BlockModel

                quiet_transformers()
                # A teacher need not be block-fine-tuned.
                chosen = attention_of(attention) or "full"
                loaded = BlockModel.from_pretrained(model_name(model), attention=chosen, device=device, dtype=dtype)
            teacher = ModelTeacher(loaded, options, batch_size=batch_size)
        else:
            if attention is not None:
                raise InputError(
                    f"--attention {attention.value} means nothing for a server, which decides itself; leave it out"
                )
            from blockrag.finetune.data.teacher import ServedTeacher

            teacher = ServedTeacher(
                base_url,
                model,
                api_key=api_key,
                max_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                concurrency=concurrency,
            )
            stack.callback(teacher.close)
        from blockrag.finetune.data.teacher import answer_file

        report = answer_file(source, output, teacher, without_answer=without_answer.value, progress=_progress(out))
        out.show(
            f"{output}: {report.responses:,} responses, {report.with_answer:,} of them with an answer; "
            f"{report.replaced:,} replaced by the gold answer, {report.dropped:,} questions dropped, "
            f"{report.without_response:,} of these without any response; "
            f"{report.lines_before:,} lines were there already"
        )
        out.result({"output": str(output), **asdict(report)})


@data.command("check", epilog=EXIT_CODES)
def check(
    source: Input,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Counts tokens: 'demo', a hub id or a directory.", show_default=False),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, help="Report lines with a longer prompt and answer.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read a file and say what it holds.

    Lists what is wrong with malformed lines, up to 20, and then exits with 1. With --model, counts tokens in that
    model's template; its weights are not loaded.
    """
    with reporting(as_json) as out:
        if max_tokens is not None and model is None:
            raise InputError(f"--max-tokens {max_tokens} needs a tokenizer to count with; pass --model too")
        from blockrag.finetune.data.checking import check_file

        if model is None:
            report = check_file(source)
        else:
            quiet_transformers()
            from blockrag.model.loading import load_tokenizer
            from blockrag.prompt import template_for

            tokenizer, facts = load_tokenizer(model_name(model))
            template = facts.template or template_for(tokenizer, name_or_path=tokenizer.name_or_path)
            report = check_file(source, template=template, tokenizer=tokenizer, max_tokens=max_tokens)
        _show(out, source, report, max_tokens)
        out.result({"input": str(source), "max_tokens": max_tokens, **asdict(report)})
        for error in report.errors:
            out.error(error)
        if report.bad_lines:
            out.exit_code = PARTLY_FAILED
            more = report.bad_lines - len(report.errors)
            out.error(f"{report.bad_lines:,} lines are malformed" + (f"; {more:,} more than listed" if more else ""))


def _write(out: Output, path: Path, lines: Iterable[Line]) -> dict[str, Any]:
    """Write a file and say what is in it."""
    from blockrag.finetune.data.lines import RagLine, write_lines

    questions = passages = bare = 0

    def counted() -> Iterator[Line]:
        nonlocal questions, passages, bare
        for line in lines:
            if isinstance(line, RagLine):
                questions += len(line.questions)
                passages += len(line.passages)
                bare += 0 if line.passages else len(line.questions)
            yield line

    try:
        with out.working(f"writing {path} ..."):
            count = write_lines(path, counted())
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; nothing was written to {path}") from None
    out.show(f"{path}: {count:,} lines, {questions:,} questions, {passages:,} passages")
    numbers = {"lines": count, "questions": questions, "passages": passages, "without_passages": bare}
    return {"output": str(path), **numbers}


def _rag_lines(path: Path) -> Iterator[RagLine]:
    from blockrag.finetune.data.lines import read_rag_lines

    return (line for _, line in read_rag_lines(path))


def _encoder(out: Output, spec: str) -> Encoder:
    with out.working(f"loading {spec} ..."):
        from blockrag.encoders import open_encoder

        quiet_transformers()
        return open_encoder(spec)


def _corpus(out: Output, index: Path | None, corpus: Path | None, encoder: str | None) -> PassageIndex:
    """The index to search.

    Raises:
        InputError: Both or neither are given, or there is no such index.
    """
    if corpus is not None and index is None:
        opened = _encoder(out, encoder or "lexical")
        from blockrag.finetune.data.ranking import corpus_index

        with out.working(f"indexing {corpus} ..."):
            return corpus_index(corpus, opened)
    if index is None or corpus is not None:
        raise InputError("where are the passages? pass either --index DIR or --corpus FILE")
    settings = built_with(index, encoder)
    opened = _encoder(out, settings.encoder if settings is not None else encoder or "lexical")
    from blockrag.index import PassageIndex

    return PassageIndex(opened, index / "index")


def _progress(out: Output) -> Callable[[AnswerReport], None]:
    """Says how far it is, seldom."""
    noted = 0

    def note(report: AnswerReport) -> None:
        nonlocal noted
        done = report.responses + report.replaced + report.dropped
        if done - noted >= _QUESTIONS_PER_NOTE:
            noted = done
            out.note(f"{done:,} questions answered")

    return note


def _show(out: Output, source: Path, report: FileReport, max_tokens: int | None) -> None:
    forms = ", ".join(f"{count:,} {form}" for form, count in report.forms.items()) or "none"
    out.show(f"{source}: lines: {forms}")
    if report.questions:
        kinds = ", ".join(f"{count:,} {kind or 'of no kind'}" for kind, count in report.kinds.items())
        out.show(f"questions: {report.questions:,} ({kinds}); {report.responses:,} with a response of their own")
    if report.passages is not None:
        out.show(f"passages per line: {_spread(report.passages)}")
    if report.with_passages:
        share = report.answerable / report.with_passages
        out.show(f"answer in the passages: {share:.1%} of {report.with_passages:,} questions with passages")
    if report.tokens is not None:
        out.show(f"tokens per line: {_spread(report.tokens)}; {report.tokens.total:,} in all")
        if report.separate_tokens is not None and report.separate_tokens != report.tokens.total:
            times = report.separate_tokens / report.tokens.total
            out.show(f"with a prompt for every question: {report.separate_tokens:,} tokens, {times:.1f} times as many")
    if report.too_long:
        shown = ", ".join(map(str, report.too_long[:_LINES_SHOWN]))
        more = " ..." if len(report.too_long) > _LINES_SHOWN else ""
        out.warning(f"{len(report.too_long):,} lines are longer than {max_tokens:,} tokens: {shown}{more}")


def _spread(spread: Spread) -> str:
    return f"{spread.least:,} to {spread.most:,}, median {spread.median:,g}, 95 % at most {spread.p95:,}"
