"""An answer as people read it and as programs read it; for every command that gives answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from blockrag.cli.output import clean

if TYPE_CHECKING:
    from blockrag.model.usage import Usage
    from blockrag.passage import Hit
    from blockrag.rag import Answer, AnswerTimings

__all__ = ["answer_json", "milliseconds", "name_of", "sources_table", "usage_json", "usage_line"]


def answer_json(question: str, answer: Answer, attention: str) -> dict[str, object]:
    """An answer as JSON types; times in seconds."""
    return {
        "question": question,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "attention": attention,
        "sources": [
            {
                "passage_id": hit.passage.id,
                "document_id": hit.passage.document_id,
                "title": hit.passage.title,
                "text": hit.passage.text,
                "score": hit.score,
            }
            for hit in answer.hits
        ],
        "usage": usage_json(answer.usage),
        "timings": asdict(answer.timings),
    }


def usage_json(usage: Usage) -> dict[str, int]:
    """Counted work, with the tokens of the whole prompt."""
    return {**asdict(usage), "prompt_tokens": usage.prompt_tokens}


def usage_line(answer: Answer) -> str:
    """Reuse and time in one line."""
    usage = answer.usage
    damaged = f" ({usage.blocks_damaged} were damaged)" if usage.blocks_damaged else ""
    kept = f" ({usage.tokens_kept:,} kept composed)" if usage.tokens_kept else ""
    missing = f"\nin full attention, for {usage.blocks_missing} passages are not stored" if usage.blocks_missing else ""
    failed = f"\nthe store failed to read or write {usage.store_failures} times" if usage.store_failures else ""
    return (
        f"{usage.tokens_reused:,} tokens reused in {usage.blocks_reused} blocks{kept}, "
        f"{usage.tokens_computed:,} computed{damaged}; {usage.new_tokens} new\n"
        f"first token after {milliseconds(answer.timings.ttft_s)} ms: {_split(answer.timings)}"
        f"{missing}{failed}"
    )


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, with a digit behind the point where it matters."""
    value = 1000 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def name_of(hit: Hit) -> str:
    """What a passage is called: its title, else how it begins."""
    return hit.passage.title or " ".join(hit.passage.text[:60].split())


def sources_table(hits: Sequence[Hit]) -> Table:
    """One line per passage: rank, score, title, document."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for column in ("right", "right", "left", "left"):
        table.add_column(justify="right" if column == "right" else "left", no_wrap=True, overflow="ellipsis")
    for rank, hit in enumerate(hits, start=1):
        document = "" if hit.passage.document_id == name_of(hit) else hit.passage.document_id
        cells = (str(rank), f"{hit.score:.2f}", clean(name_of(hit)), clean(document))
        table.add_row(*map(Text, cells))
    return table


def _split(timings: AnswerTimings) -> str:
    steps = {
        "retrieve": timings.retrieve_s,
        "load": timings.load_s,
        "compose": timings.compose_s,
        "missing blocks": timings.block_prefill_s,
        "question": timings.query_prefill_s,
    }
    return ", ".join(f"{name} {milliseconds(seconds)}" for name, seconds in steps.items() if seconds >= 5e-5)
