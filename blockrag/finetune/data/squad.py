"""SQuAD 1.1, 2.0 and XQuAD: paragraphs with several questions each, which is what makes training on them cheap.

A line of the format may hold several questions about the same passages. Training reads the passages of such a line
once and every question behind them as a block of its own, so a line costs its passages plus its questions, where a
prompt per question costs the passages as often as there are questions.

Two forms are read: the published JSON, and the flat records of the copy on the Hugging Face hub (rajpurkar/squad,
parquet or JSON lines), whose paragraphs are found again by their text.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockrag.errors import DataError, InputError
from blockrag.finetune.data.lines import Candidate, Question, RagLine, parse_candidate, parse_question
from blockrag.finetune.data.parts import LeftOut, distinct, nobody_asks
from blockrag.finetune.data.records import Record, read_records
from blockrag.passage import Passage

__all__ = ["read_squad"]


@dataclass(frozen=True, slots=True)
class _Paragraph:
    article: str
    passage: Passage
    questions: tuple[Question, ...]

    @property
    def text(self) -> str:
        return self.passage.text


def read_squad(
    path: str | Path,
    *,
    gold: int = 1,
    distractors: int = 0,
    same_article: bool = False,
    seed: int = 42,
    left_out: LeftOut = nobody_asks,
) -> Iterator[RagLine]:
    """One line per paragraph with all its questions; or per group of paragraphs, among others if wanted.

    Args:
        path: A SQuAD file, in any of the forms of `read_records`. It is held in memory.
        gold: Paragraphs per line that its questions are about. With more than one they are dealt out at random, no
            passage is marked as supporting (each supports some of the questions), and the last line may hold fewer.
        distractors: Other paragraphs per line, drawn at random.
        same_article: Draw them from the article of the line's first paragraph as far as it goes, then from all others.
        seed: Decides what is drawn and the order of the passages.
        left_out: Told of every question without an answer (SQuAD 2.0) and of every paragraph without questions; these
            paragraphs still serve as distractors.

    Yields:
        Lines in file order where `gold` is 1.

    Raises:
        DataError: A record is malformed; names the file, the article and the paragraph.
        InputError: `gold` or `distractors` is out of range, there are fewer other paragraphs than that, or
            `same_article` without any.
    """
    if gold < 1 or distractors < 0:
        raise InputError(f"gold must be at least 1 and distractors at least 0, got {gold} and {distractors}")
    if same_article and not distractors:
        raise InputError("same_article says where other paragraphs come from, but distractors is 0; ask for some")
    paragraphs = list(_paragraphs(path, left_out))
    asked = [paragraph for paragraph in paragraphs if paragraph.questions]
    for _ in range(len(paragraphs) - len(asked)):
        left_out("paragraph without questions")
    distinct_texts = len({paragraph.text for paragraph in paragraphs})
    if distractors and distractors > distinct_texts - gold:
        raise InputError(
            f"{path} has {distinct_texts:,} paragraphs, too few for {gold} with {distractors} others; ask for fewer"
        )
    draw = random.Random(seed)
    if gold > 1:
        draw.shuffle(asked)
    by_article: dict[str, list[_Paragraph]] = {}
    for paragraph in paragraphs:
        by_article.setdefault(paragraph.article, []).append(paragraph)
    for start in range(0, len(asked), gold):
        own = asked[start : start + gold]
        near = by_article[own[0].article] if same_article else []
        yield _line(own, _others(own, near, paragraphs, distractors, draw), draw)


def _others(
    own: Sequence[_Paragraph],
    near: Sequence[_Paragraph],
    everywhere: Sequence[_Paragraph],
    count: int,
    draw: random.Random,
) -> list[_Paragraph]:
    """`count` paragraphs that differ from the line's own and from each other, those of `near` first."""
    chosen: list[_Paragraph] = []
    taken = {paragraph.text for paragraph in own}
    for candidate in draw.sample(near, len(near)) if count else []:
        if len(chosen) < count and candidate.text not in taken:
            chosen.append(candidate)
            taken.add(candidate.text)
    while len(chosen) < count:
        candidate = everywhere[draw.randrange(len(everywhere))]
        if candidate.text not in taken:
            chosen.append(candidate)
            taken.add(candidate.text)
    return chosen


def _line(own: Sequence[_Paragraph], others: Sequence[_Paragraph], draw: random.Random) -> RagLine:
    many = len(own) > 1
    passages = [Candidate(one.passage, supports=None if many else True) for one in own]
    passages += [Candidate(one.passage, supports=None if many else False) for one in others]
    if len(passages) > 1:
        draw.shuffle(passages)
    questions = tuple(question for one in own for question in one.questions)
    return RagLine(passages=tuple(passages), questions=questions)


def _paragraphs(path: str | Path, left_out: LeftOut) -> Iterator[_Paragraph]:
    flat: dict[tuple[str, str], list[Record]] = {}
    for record in read_records(path):
        if "data" in record.fields:
            for number, article in enumerate(record.list_of("data"), start=1):
                yield from _article(article, record.where, f"article {number}", left_out)
        elif "context" in record.fields:
            context = record.fields["context"]
            if not isinstance(context, str):
                raise DataError(f"{record.where}: context must be a string, got {context!r:.60}")
            flat.setdefault((str(record.fields.get("title") or ""), context), []).append(record)
        else:
            raise DataError(
                f"{record.where}: has the fields {sorted(record.fields)}; SQuAD has data, or context and question"
            )
    numbers: dict[str, int] = {}
    for (title, context), records in flat.items():
        numbers[title] = numbers.get(title, 0) + 1
        asked = [(record.where, {**record.fields, "answers": _listed_answers(record)}) for record in records]
        identity = f"{title or Path(path).name}#{numbers[title]}"
        yield _paragraph(title, identity, context, asked, records[0].where, left_out)


def _listed_answers(record: Record) -> object:
    """{"text": [...], "answer_start": [...]} as a list of objects, as the JSON has it."""
    answers = record.fields.get("answers")
    texts = answers.get("text") if isinstance(answers, dict) else None
    return [{"text": text} for text in texts] if isinstance(texts, list) else answers


def _article(article: object, file: str, name: str, left_out: LeftOut) -> Iterator[_Paragraph]:
    where = f"{file}, {name}"
    if not isinstance(article, dict) or not isinstance(article.get("paragraphs"), list):
        raise DataError(f"{where}: must be an object with a list of paragraphs, got {article!r:.60}")
    title = str(article.get("title") or "")
    for number, paragraph in enumerate(article["paragraphs"], start=1):
        place = f"{where}, paragraph {number}"
        if not isinstance(paragraph, dict) or not isinstance(paragraph.get("qas"), list):
            raise DataError(f"{place}: must be an object with a context and a list of qas, got {paragraph!r:.60}")
        identity = f"{title}#{number}" if title else f"{name}, paragraph {number}"
        asked = [(f"{place}, question {count}", item) for count, item in enumerate(paragraph["qas"], start=1)]
        yield _paragraph(title, identity, paragraph.get("context"), asked, place, left_out)


def _paragraph(
    title: str, identity: str, context: object, asked: Sequence[tuple[str, Any]], where: str, left_out: LeftOut
) -> _Paragraph:
    """A paragraph from its parts; questions each with what errors call it."""
    questions = []
    for place, item in asked:
        answers = item.get("answers") if isinstance(item, dict) else None
        if not isinstance(answers, list) or not all(isinstance(one, dict) for one in answers):
            raise DataError(f"{place}: must be an object with a question and a list of answers, got {item!r:.60}")
        if item.get("is_impossible") or not answers:
            left_out("unanswerable question")
            continue
        fields = {"question": item.get("question"), "answers": distinct(one.get("text") for one in answers)}
        questions.append(parse_question(fields | ({"id": str(item["id"])} if item.get("id") else {}), place))
    # Titles are those of Wikipedia's addresses.
    fields = {"id": identity, "title": title.replace("_", " "), "text": context}
    return _Paragraph(title, parse_candidate(fields, 1, where).passage, tuple(questions))
