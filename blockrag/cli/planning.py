"""`blockrag plan`: what storing documents' KV states would cost here, whether it fits, and whether it pays."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from blockrag.cli.directory import Settings, find_settings, model_name
from blockrag.cli.indexing import MaxPassageTokens, Sources, size
from blockrag.cli.options import AsJson, Device, Dtype, Encoder, Model, PrecisionOption, precision_of
from blockrag.cli.output import DOES_NOT_FIT, PARTLY_FAILED, Output, clean, quiet_transformers, reporting
from blockrag.errors import InputError

if TYPE_CHECKING:
    from blockrag.codec import Precision
    from blockrag.model.block_model import BlockModel
    from blockrag.model.outline import ModelOutline
    from blockrag.planning import Plan
    from blockrag.planning.planner import Speed

__all__ = ["plan"]

IndexPath = Annotated[
    Path | None,
    typer.Option("--path", envvar="BLOCKRAG_PATH", help="Where the index would be; by default here.", metavar="DIR"),
]
Store = Annotated[str | None, typer.Option("--store", metavar="URL", help="Where blocks would go, if not in DIR.")]
K = Annotated[int, typer.Option("-k", "--k", min=1, help="Passages per question.")]
Budgets = Annotated[
    list[str] | None,
    typer.Option("--budget", metavar="SIZE", help="A smaller store to compare, e.g. 200GB; may be given again."),
]
Zipf = Annotated[float, typer.Option("--zipf", min=0, help="How unevenly passages are asked for; 0: all alike.")]
NoMeasure = Annotated[bool, typer.Option("--no-measure", help="Only count; needs no weights.")]
Seconds = Annotated[float, typer.Option("--seconds", min=0.1, help="How long to measure, about.")]
Sample = Annotated[
    str, typer.Option("--sample", metavar="SIZE", help="Of a larger corpus, tokenize this much text, at random.")
]
Exact = Annotated[bool, typer.Option("--exact", help="Tokenize all of it, however large.")]

_SHOWN_FAILURES = 10


def plan(
    sources: Sources,
    model: Model = None,
    encoder: Encoder = None,
    path: IndexPath = None,
    store: Store = None,
    precision: PrecisionOption = None,
    max_passage_tokens: MaxPassageTokens = None,
    k: K = 5,
    budget: Budgets = None,
    zipf: Zipf = 0.8,
    no_measure: NoMeasure = False,
    seconds: Seconds = 5.0,
    sample: Sample = "32MB",
    exact: Exact = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Tell what storing documents would cost.

    Counts what `ingest` would compute and store, and compares it with the room there is. Then measures, for a few
    seconds, how fast this machine computes passages and how fast it loads them, and says which is faster. Nothing
    stays behind. Exit code 3 if the blocks, or with --budget the largest such store, take more than 80 % of the free
    space.
    """
    with reporting(as_json) as out:
        for source in sources:
            if not source.exists():
                raise InputError(f"there is no file or folder {str(source)!r}; pass paths that exist")
        from blockrag.encoders import open_encoder
        from blockrag.ingest import RichProgress
        from blockrag.model.block_model import BlockModel
        from blockrag.planning.planner import Workload
        from blockrag.planning.planner import plan as make_plan
        from blockrag.planning.target import Target
        from blockrag.stores import parse_bytes

        quiet_transformers()
        directory = Path() if path is None else path
        known = find_settings(directory) or Settings()
        budgets = [parse_bytes(one) for one in budget or ()]
        target = Target.in_directory(directory / "kv", known.max_bytes) if store is None else Target.at(store)
        name = known.model if model is None else model_name(model)
        planned = _load(out, name, precision_of(precision) or known.precision, device, dtype, measure=not no_measure)
        made = make_plan(
            sources,
            planned,
            target=target,
            encoder=open_encoder(encoder or known.encoder),
            max_passage_tokens=max_passage_tokens or known.max_passage_tokens,
            workload=Workload(k=k, zipf=zipf),
            budgets=budgets,
            seconds=seconds,
            sample_bytes=None if exact else parse_bytes(sample),
            progress=RichProgress(out.messages),
        )
        if made.not_measured and isinstance(planned, BlockModel):
            out.note(f"note: nothing is measured: {made.not_measured}")
        _show(out, name, made)
        out.result({"model": name, **_as_json(made)})
        failures = made.inventory.failures
        for failure in failures[:_SHOWN_FAILURES]:
            out.error(str(failure))
        if len(failures) > _SHOWN_FAILURES:
            out.error(f"... and {len(failures) - _SHOWN_FAILURES:,} more, which --json lists")
        if failures:
            out.exit_code = PARTLY_FAILED
        if not made.fits:
            out.exit_code = DOES_NOT_FIT
            out.error(_no_room(made))


def _load(
    out: Output, name: str, precision: Precision | None, device: str, dtype: str, *, measure: bool
) -> BlockModel | ModelOutline:
    """The model, or its outline where nothing is to be measured or its weights are not there."""
    with out.working(f"loading {name} ..."):
        from blockrag.model.block_model import BlockModel
        from blockrag.model.outline import ModelOutline

        if measure:
            try:
                return BlockModel.from_pretrained(name, device=device, dtype=dtype, precision=precision, kept_bytes=0)
            except InputError as error:
                outline = ModelOutline.load(name, device=device, dtype=dtype, precision=precision)
                out.note(f"note: nothing is measured: {error}")
                return outline
        return ModelOutline.load(name, device=device, dtype=dtype, precision=precision)


def _show(out: Output, name: str, made: Plan) -> None:
    inventory = made.inventory
    about = "" if inventory.is_exact else "about "
    out.show(
        Text(
            f"{_count(inventory.documents, 'document')}, {about}{_count(inventory.passages, 'passage')}, "
            f"{_count(inventory.distinct_blocks, 'distinct block')}, {_count(inventory.tokens, 'token')}",
            style="bold",
        )
    )
    if not inventory.is_exact:
        off = "" if inventory.error is None else f", give or take {inventory.error:.1%}"
        out.show(
            f"inferred from {inventory.documents_counted:,} documents chosen at random{off}; texts that repeat beyond "
            "these are not known, and would take less (--exact tokenizes everything)"
        )
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for label, value in _facts(name, made).items():
        facts.add_row(Text(label, style="dim"), Text(clean(value)))
    out.show(facts, "", _precisions(made))
    if made.speed is not None:
        out.show("", _measured(made, made.speed))
    out.show("", _budgets(made), "")
    if made.advice is not None:
        out.show(Text(f"recommended: {made.advice.choice}", style="bold"), made.advice.reason)
        if made.advice.budget is not None:
            out.show(f"budget: {size(made.advice.budget)} (--max-bytes {made.advice.budget})")


def _facts(name: str, made: Plan) -> dict[str, str]:
    inventory = made.inventory
    facts = {
        "model": f"{name}, blocks in {made.precision}",
        "text": f"{size(inventory.text_bytes)}; the blocks take {made.kv_per_text:,.0f} times that",
        "per block": f"{inventory.tokens / inventory.distinct_blocks:,.1f} tokens, "
        f"{size(round(made.nbytes[made.precision] / inventory.distinct_blocks))}",
    }
    if inventory.stored:
        facts["stored already"] = f"{_count(inventory.stored_blocks, 'block')}; {size(made.new_bytes)} to come"
    if made.second_copy_beyond is not None:
        facts["long prompts"] = (
            f"beyond {made.second_copy_beyond:,} tokens they need blocks of their own: up to twice the bytes"
        )
    if made.index_bytes:
        facts["index"] = f"about {size(made.index_bytes)}"
    facts["free"] = f"{_size_or_unknown(made.free_bytes)} at {made.target.where}"
    if made.target.scheme != "memory":
        facts["free memory"] = _size_or_unknown(made.free_memory)
    return facts


def _precisions(made: Plan) -> Table:
    """Bytes in each precision; those that take the same share a row."""
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("at rest", no_wrap=True)
    for column in ("bytes", "of the free", "of free memory"):
        table.add_column(column, justify="right")
    rows: dict[int, list[str]] = {}
    for name, nbytes in made.nbytes.items():
        rows.setdefault(nbytes, []).append(name)
    for nbytes, names in rows.items():
        cells = [size(nbytes), _share(nbytes, made.free_bytes), _share(nbytes, made.free_memory)]
        chosen = made.precision in names
        table.add_row(", ".join(names) + (" (chosen)" if chosen else ""), *cells, style="bold" if chosen else "")
    return table


def _measured(made: Plan, speed: Speed) -> Table:
    from blockrag.planning.advice import times

    rates = speed.rates
    to_come = "what is not stored yet" if made.inventory.stored else "everything"
    faster = f"loading is {times(speed.gain)}" if speed.gain >= 1 else f"computing is {times(1 / speed.gain)}"
    store = "a temporary store beside it" if made.target.scheme == "disk" else made.target.scheme
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    rows = {
        "computing": f"{rates.prefill_tokens_per_s:,.0f} tokens/s in {rates.dtype} on {rates.device}, "
        f"{_count(rates.passages, 'passage')} at a time",
        "building": f"{rates.build_tokens_per_s:,.0f} tokens/s, {_duration(speed.build_s)} for {to_come}",
        "loading": f"{_rate(rates.load_bytes_per_s)} from {store}, read, checked and placed, warm; "
        f"it breaks even at {_rate(speed.break_even_bytes_per_s)}",
        _count(made.workload.k, "passage"): f"loaded in {_duration(speed.load_s)}, "
        f"computed in {_duration(speed.compute_s)}: {faster} as fast",
    }
    for label, value in rows.items():
        table.add_row(Text(label, style="dim"), Text(value))
    return table


def _budgets(made: Plan) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    columns = ["budget", "of the blocks", f"hit rate (Zipf {made.workload.zipf:g})"]
    if made.speed is not None:
        columns.append(f"{_count(made.workload.k, 'passage')}, mean")
    for column in columns:
        table.add_column(column, justify="right")
    for one in made.budgets:
        cells = [size(one.nbytes), f"{one.share:.0%}", f"{one.hit_rate:.0%}"]
        table.add_row(*cells, *([] if one.mean_s is None else [_duration(one.mean_s)]))
    return table


def _no_room(made: Plan) -> str:
    from blockrag.planning.planner import USABLE_SHARE

    free = made.free_bytes or 0
    return (
        f"it does not fit: {size(made.needed_bytes)} of {size(free)} that are free at {made.target.where}, and no more "
        f"than {USABLE_SHARE:.0%} should be used; free some, pass --precision int8 or int4, a smaller --budget, or "
        "another --path or --store"
    )


def _as_json(made: Plan) -> dict[str, object]:
    inventory, speed = made.inventory, made.speed
    return {
        "precision": made.precision,
        "documents": inventory.documents,
        "passages": inventory.passages,
        "blocks": inventory.distinct_blocks,
        "tokens": inventory.tokens,
        "exact": inventory.is_exact,
        "documents_counted": inventory.documents_counted,
        "relative_error": inventory.error,
        "text_bytes": inventory.text_bytes,
        "bytes": dict(made.nbytes),
        "bytes_per_text_byte": made.kv_per_text,
        "blocks_stored": inventory.stored_blocks,
        "bytes_new": made.new_bytes,
        "index_bytes": made.index_bytes,
        "store": made.target.name,
        "free_bytes": made.free_bytes,
        "free_memory": made.free_memory,
        "needed_bytes": made.needed_bytes,
        "fits": made.fits,
        **asdict(made.workload),
        "budgets": [asdict(one) for one in made.budgets],
        "not_measured": made.not_measured,
        "measured": None if speed is None else {**asdict(speed), "gain": speed.gain},
        "recommended": None if made.advice is None else asdict(made.advice),
        "failures": [
            {"source": failure.source, "document_id": failure.document_id, "error": str(failure.error)}
            for failure in inventory.failures
        ],
    }


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _share(nbytes: int, free: int | None) -> str:
    if free is None:
        return "not known"
    share = nbytes / max(1, free)
    if share < 0.001:
        return "< 0.1%"
    return f"{share:.1%}" if share < 10 else f"{share:,.0f} times"


def _size_or_unknown(nbytes: int | None) -> str:
    return "not known" if nbytes is None else size(nbytes)


def _rate(nbytes_per_s: float) -> str:
    return f"{size(round(nbytes_per_s))}/s"


def _duration(seconds: float) -> str:
    """Seconds in the unit that people would use."""
    for limit, unit, factor in ((1, "ms", 1e3), (120, "s", 1.0), (7200, "min", 1 / 60), (172800, "h", 1 / 3600)):
        if seconds < limit:
            value = seconds * factor
            return f"{value:.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"
    return f"{seconds / 86400:,.0f} days"
