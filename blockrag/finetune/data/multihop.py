"""2WikiMultihopQA, HotpotQA and MuSiQue: questions that come with the paragraphs to choose from.

The three sets and their copies have one content in four shapes, told apart by their fields:

* `context` as a list of [title, sentences] pairs: HotpotQA's distractor JSON and 2WikiMultihopQA's. The copy of the
  latter on the Hugging Face hub (xanhho/2WikiMultihopQA, parquet) keeps the list as a string of JSON.
* `context` as {"title": [...], "sentences": [[...], ...]}: HotpotQA on the hub (hotpot_qa), JSON lines or parquet.
* `contexts` of objects with a `paragraph_text`: the sampled sets of IRCoT (arXiv 2212.10509).
* `paragraphs` of such objects: MuSiQue (arXiv 2108.00573).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blockrag.errors import DataError
from blockrag.finetune.data.lines import RagLine
from blockrag.finetune.data.parts import LeftOut, nobody_asks, rag_line
from blockrag.finetune.data.records import Record, read_records

__all__ = ["read_multihop"]


def read_multihop(
    path: str | Path, *, sentence_separator: str = " ", left_out: LeftOut = nobody_asks
) -> Iterator[RagLine]:
    """One line per question, its paragraphs in the order given; those that hold supporting facts support.

    Args:
        path: A file in one of the shapes above, any of the forms of `read_records`.
        sentence_separator: What stands between the sentences of a paragraph, where they come as a list and do not end
            with white space themselves. HotpotQA's sentences are cut from whole text, so that "" restores it; the
            published Block-Attention data has "" for 2WikiMultihopQA too, which lacks the spaces.
        left_out: Told of every question and paragraph that is left out: questions that the set marks as unanswerable,
            paragraphs without text.

    Raises:
        DataError: A record is malformed; names the file and the record.
    """
    for record in read_records(path):
        if record.fields.get("answerable") is False:
            left_out("unanswerable question")
            continue
        passages = _passages(record, sentence_separator)
        yield rag_line(
            record,
            passages=passages,
            question=record.fields.get("question", record.fields.get("question_text")),
            answers=_answers(record),
            kind=record.fields.get("type"),
            left_out=left_out,
        )


def _passages(record: Record, separator: str) -> list[dict[str, object]]:
    for name in ("contexts", "paragraphs"):
        if name in record.fields:
            return [_whole(record, item, name) for item in record.list_of(name)]
    context = record.unpacked("context")
    pairs = _pairs(record, "context", context, "title", "sentences")
    facts = record.unpacked("supporting_facts")
    supporting = None
    if facts is not None:
        supporting = [title for title, _ in _pairs(record, "supporting_facts", facts, "title", "sent_id")]
    return [_joined(record, title, sentences, separator, supporting) for title, sentences in pairs]


def _whole(record: Record, item: object, name: str) -> dict[str, object]:
    if not isinstance(item, dict) or "paragraph_text" not in item:
        raise DataError(f"{record.where}: {name} must hold objects with a paragraph_text, got {item!r:.60}")
    fields = {"title": item.get("title") or "", "text": item["paragraph_text"]}
    return fields | ({"supports": item["is_supporting"]} if "is_supporting" in item else {})


def _joined(
    record: Record, title: object, sentences: object, separator: str, supporting: list[Any] | None
) -> dict[str, object]:
    if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
        raise DataError(f"{record.where}: paragraph {title!r:.60} must hold a list of sentences, got {sentences!r:.60}")
    text = ""
    for sentence in sentences:
        text += (separator if text and not text[-1].isspace() and not sentence[:1].isspace() else "") + sentence
    fields: dict[str, object] = {"title": title, "text": text}
    return fields if supporting is None else fields | {"supports": title in supporting}


def _pairs(record: Record, name: str, value: object, left: str, right: str) -> list[tuple[Any, Any]]:
    """[[a, b], ...] or {left: [a, ...], right: [b, ...]} as pairs."""
    if isinstance(value, dict):
        lefts, rights = value.get(left), value.get(right)
        if isinstance(lefts, list) and isinstance(rights, list) and len(lefts) == len(rights):
            return list(zip(lefts, rights, strict=True))
    elif isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return [(first, second) for first, second in value]
    raise DataError(
        f"{record.where}: {name} must be a list of [{left}, {right}] pairs or an object with the lists {left} and "
        f"{right}, got {value!r:.60}"
    )


def _answers(record: Record) -> list[Any]:
    """The answer and what MuSiQue calls its aliases; or the spans of IRCoT's answers."""
    if "answers_objects" not in record.fields:
        aliases = record.list_of("answer_aliases") if record.fields.get("answer_aliases") else ()
        return [record.fields.get("answer"), *aliases]
    objects = record.list_of("answers_objects")
    if not all(isinstance(one, dict) and isinstance(one.get("spans"), list) for one in objects):
        raise DataError(f"{record.where}: answers_objects must hold objects with spans, got {objects!r:.60}")
    return [span for one in objects for span in one["spans"]]
