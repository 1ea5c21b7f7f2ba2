"""Which passages a question is given: its own candidates ranked anew, or what a corpus has for it.

The published Block-Attention data ranks each question's own candidates with Contriever (facebook/contriever-msmarco,
dot product, the passage's text without its title), keeps the ten best and puts the best one first; its paper says the
best one stands last. Both orders are here.

Ranking depends on the question, so a line with several questions becomes one line for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

from blockrag.encoders import CorpusCounts, Encoder, RescoringEncoder, StatisticalEncoder
from blockrag.errors import DataError, InputError
from blockrag.evaluation.metrics import supporting
from blockrag.finetune.data.lines import Candidate, RagLine
from blockrag.passage import Passage

if TYPE_CHECKING:
    from blockrag.index import PassageIndex
    from blockrag.ingest import DocumentFailure

__all__ = ["Order", "corpus_index", "rerank", "retrieve", "split_questions"]

Order = Literal["best-first", "best-last", "given"]
"""Of the passages in the prompt; "given" keeps the order in which they came."""

_QUESTIONS_AT_ONCE = 64
_PASSAGES_AT_ONCE = 1024


def split_questions(line: RagLine) -> Iterator[RagLine]:
    """The line once for each of its questions."""
    for question in line.questions:
        yield replace(line, questions=(question,))


def rerank(
    lines: Iterable[RagLine],
    encoder: Encoder,
    *,
    top_k: int = 10,
    order: Order = "best-first",
    titles: bool = False,
) -> Iterator[RagLine]:
    """Keep the candidates that an encoder finds most similar to the question, with their scores.

    An encoder that weighs words by how rare they are (lexical) counts them in the question's own candidates: what
    tells these apart is what is asked for.

    Args:
        lines: Lines with candidates; one without any stays as it is.
        encoder: Similarity is the inner product, or the encoder's own score.
        top_k: Candidates kept.
        order: Of those kept. Equal scores stay in the order given.
        titles: Whether the encoder sees a passage's title.

    Yields:
        One line per question.

    Raises:
        InputError: `top_k` is below 1.
    """
    _check_top_k(top_k)
    questions = (one for line in lines for one in split_questions(line))
    while some := list(islice(questions, _QUESTIONS_AT_ONCE)):
        for line, scores in zip(some, _scores(some, encoder, titles=titles), strict=True):
            scored = [replace(one, score=score) for one, score in zip(line.passages, scores, strict=True)]
            yield replace(line, passages=tuple(_ordered(scored, top_k, order)))


def retrieve(
    lines: Iterable[RagLine],
    index: PassageIndex,
    *,
    top_k: int = 10,
    order: Literal["best-first", "best-last"] = "best-first",
) -> Iterator[RagLine]:
    """Give each question the passages that a corpus has for it, in place of any it came with.

    A passage supports if its title and text contain an answer, compared as in `evaluation.metrics`.

    Args:
        lines: Lines with questions.
        index: The corpus.
        top_k: Passages per question; fewer where fewer are found, none where nothing is.
        order: Of the passages.

    Yields:
        One line per question.

    Raises:
        InputError: `top_k` is below 1.
    """
    _check_top_k(top_k)
    questions = (one for line in lines for one in split_questions(line))
    while some := list(islice(questions, _QUESTIONS_AT_ONCE)):
        found = index.search_many([line.questions[0].question for line in some], top_k)
        for line, hits in zip(some, found, strict=True):
            candidates = [Candidate(hit.passage, score=hit.score) for hit in hits]
            marks, _ = supporting(candidates, line.questions[0].answers)
            marked = [replace(one, supports=mark) for one, mark in zip(candidates, marks, strict=True)]
            yield replace(line, passages=tuple(marked if order == "best-first" else marked[::-1]))


def corpus_index(path: str | Path, encoder: Encoder) -> PassageIndex:
    """An index in memory over a file of passages, each record a passage as it is.

    Args:
        path: What `blockrag.ingest.read_documents` takes: records with `text`, `title` and `id`, or files of text.
        encoder: The index's encoder.

    Raises:
        DataError: The file cannot be read, a record is malformed, or there are none.
    """
    from blockrag.index import PassageIndex
    from blockrag.ingest import read_documents

    def refuse(failure: DocumentFailure) -> NoReturn:
        raise DataError(f"{path}: {failure}") from failure.error

    index = PassageIndex(encoder)
    try:
        documents = (one for one in read_documents([Path(path)], on_failure=refuse) if one.text.strip())
        while some := list(islice(documents, _PASSAGES_AT_ONCE)):
            index.add([Passage(id=one.id, title=one.title, text=one.text) for one in some])
        if not len(index):
            raise DataError(f"{path} holds no passages; pass a file of records with a text")
    except BaseException:
        index.close()
        raise
    return index


def _check_top_k(top_k: int) -> None:
    if top_k < 1:
        raise InputError(f"top_k must be at least 1, got {top_k}")


def _ordered(candidates: Sequence[Candidate], top_k: int, order: Order) -> list[Candidate]:
    ranked = sorted(range(len(candidates)), key=lambda number: -(candidates[number].score or 0.0))[:top_k]
    chosen = {"best-first": ranked, "best-last": ranked[::-1], "given": sorted(ranked)}[order]
    return [candidates[number] for number in chosen]


def _scores(lines: Sequence[RagLine], encoder: Encoder, *, titles: bool) -> list[list[float]]:
    """For each line, the score of each of its candidates."""
    seen = [[one.passage if titles else replace(one.passage, title="") for one in line.passages] for line in lines]
    asked = [line.questions[0].question for line in lines]
    if isinstance(encoder, RescoringEncoder):
        return [
            encoder.score(question, passages, CorpusCounts(encoder.passage_terms(passages)))
            for question, passages in zip(asked, seen, strict=True)
        ]
    # Questions that were packed into one line share their passages.
    rows: dict[tuple[str, str], int] = {}
    for passages in seen:
        for one in passages:
            rows.setdefault((one.title, one.text), len(rows))
    vectors = encoder.encode_passages([Passage(str(row), text, title) for (title, text), row in rows.items()])
    if isinstance(encoder, StatisticalEncoder):
        counts = [CorpusCounts(encoder.passage_terms(passages)) for passages in seen]
        queries = [encoder.encode_queries_with([one], count)[0] for one, count in zip(asked, counts, strict=True)]
    else:
        queries = list(encoder.encode_queries(asked))
    return [
        [float(query @ vectors[rows[one.title, one.text]]) for one in passages]
        for query, passages in zip(queries, seen, strict=True)
    ]
