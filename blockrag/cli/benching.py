"""`blockrag bench`: how fast composing is on this machine, with a shape of random weights or anyone's model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockrag.cli.options import AsJson, Device, Dtype
from blockrag.cli.output import EXIT_CODES, Output, quiet_transformers, reporting
from blockrag.errors import InputError

if TYPE_CHECKING:
    from blockrag.evaluation.speed.shapes import Subject, SubjectSpec

__all__ = ["bench"]

bench = typer.Typer(
    no_args_is_help=True,
    help="""Measure on this machine: times to the first token, decoding, composing, prebuilding, memory.

    Models are shapes with random weights (nothing is downloaded) or your own. Progress goes to standard error, the
    tables to standard output, and JSON, Markdown and plots to --output. docs/benchmarks.md explains every column.
    """,
    epilog=EXIT_CODES,
)

Shape = Annotated[
    str, typer.Option("--shape", help="Random weights: tiny-15m, 100m, llama-3.2-1b, qwen3-0.6b, llama-3.1-8b, smoke.")
]
Model = Annotated[
    str | None,
    typer.Option("--model", help="'demo', a hub id or a directory, in place of a shape.", show_default=False),
]
Precision = Annotated[
    str | None, typer.Option("--precision", help="Of blocks at rest; by default the library's.", show_default=False)
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Threads to compute with; by default torch's.", show_default=False),
]
OutputDirectory = Annotated[Path, typer.Option("--output", help="Each result gets a directory of its own in here.")]
Note = Annotated[str, typer.Option("--note", help="Kept with the result, e.g. 'shared machine'.", show_default=False)]
SeedOption = Annotated[int, typer.Option("--seed", help="Of weights and prompts.")]
Repeats = Annotated[
    int | None, typer.Option("--repeats", min=1, help="Measured repeats per point.", show_default=False)
]
Lengths = Annotated[
    str | None, typer.Option("--lengths", help="Tokens of each prompt, e.g. 50,512,1K,32K.", show_default=False)
]
QueryTokens = Annotated[
    int | None, typer.Option("--query-tokens", min=1, help="Tokens of the query.", show_default=False)
]
BlockTokens = Annotated[
    str | None,
    typer.Option("--block-tokens", help="Least and most tokens of a passage, e.g. 128,256.", show_default=False),
]

_OUTPUT = Path("blockrag-bench")
_SHAPE = "tiny-15m"


@dataclass(frozen=True, slots=True)
class _Common:
    """The options that every benchmark has."""

    shape: str
    model: str | None
    device: str
    dtype: str
    precision: str | None
    threads: int | None
    seed: int
    output: Path
    note: str
    as_json: bool

    def spec(self) -> SubjectSpec:
        """What is measured, not loaded yet.

        Raises:
            InputError: A shape and a model are given.
        """
        if self.model is not None and self.shape != _SHAPE:
            raise InputError(f"--shape {self.shape} and --model {self.model} exclude each other; pass one of them")
        import torch

        from blockrag.evaluation.speed.shapes import SubjectSpec

        quiet_transformers()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return SubjectSpec(
            shape=self.shape,
            model=self.model,
            device=self.device,
            dtype=self.dtype,
            precision=self.precision,  # type: ignore[arg-type]
            seed=self.seed,
        )


@bench.command("ttft", epilog=EXIT_CODES)
def ttft(
    shape: Shape = _SHAPE,
    model: Model = None,
    lengths: Lengths = None,
    modes: Annotated[
        str | None,
        typer.Option(
            "--modes",
            help="Some of full,stock,cold,seed,disk-uncached,disk,memory,pinned,device,kept.",
            show_default=False,
        ),
    ] = None,
    once: Annotated[
        str, typer.Option("--once", help="Modes that run a single time, e.g. full,cold.", show_default=False)
    ] = "",
    store: Annotated[
        list[str] | None,
        typer.Option("--store", help="URL of a store to measure as well; may be repeated.", show_default=False),
    ] = None,
    repeats: Repeats = None,
    query_tokens: QueryTokens = None,
    block_tokens: BlockTokens = None,
    passages: Annotated[
        int | None,
        typer.Option("--passages", min=0, help="Passages of the searched index; 0 for none.", show_default=False),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    precision: Precision = None,
    threads: Threads = None,
    seed: SeedOption = 0,
    note: Note = "",
    output: OutputDirectory = _OUTPUT,
    as_json: AsJson = False,
) -> None:
    """Time to the first token, by prompt length.

    The prompt is prefilled whole, its passages computed cold, or composed from each kind of store; the modes take
    turns. 'seed' composes as the method's published code does it; 'kept' asks again about the same
    passages. Lower bounds from rates measured in the same run stand beside the times.
    """
    common = _Common(shape, model, device, dtype, precision, threads, seed, output, note, as_json)

    def measure(out: Output) -> dict[str, Any]:
        given = _given(
            lengths=_numbers("--lengths", lengths),
            modes=_words(modes),
            once=_words(once),
            repeats=repeats,
            query_tokens=query_tokens,
            block_tokens=_pair("--block-tokens", block_tokens),
            passages=passages,
            seed=seed,
        )
        from blockrag.evaluation.speed.ttft import LENGTHS, TtftSettings, available_modes, measure_ttft

        settings = TtftSettings(**{"modes": available_modes(), **given})
        subject = _load(out, common.spec())
        if lengths is None:
            settings = replace(settings, lengths=_possible(subject, LENGTHS))
        return measure_ttft(subject, settings, stores=store or (), note=note, progress=out.note)

    _report(common, measure)


@bench.command("decode", epilog=EXIT_CODES)
def decode(
    shape: Shape = _SHAPE,
    model: Model = None,
    lengths: Lengths = None,
    batch_lengths: Annotated[
        str | None,
        typer.Option("--batch-lengths", help="Tokens of each prompt of a batch; 0 for no batches.", show_default=False),
    ] = None,
    batch_sizes: Annotated[
        str | None, typer.Option("--batch-sizes", help="Prompts decoded together, e.g. 1,8.", show_default=False)
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option("--new-tokens", min=2, help="Tokens of each answer.", show_default=False)
    ] = None,
    repeats: Repeats = None,
    query_tokens: QueryTokens = None,
    block_tokens: BlockTokens = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    precision: Precision = None,
    threads: Threads = None,
    seed: SeedOption = 0,
    note: Note = "",
    output: OutputDirectory = _OUTPUT,
    as_json: AsJson = False,
) -> None:
    """Tokens per second behind a composed prompt.

    Against transformers' own generate, and of several prompts at once. Both sides decode greedily from the same KV
    states, taking turns, and their tokens are compared.
    """
    common = _Common(shape, model, device, dtype, precision, threads, seed, output, note, as_json)

    def measure(out: Output) -> dict[str, Any]:
        batches = _numbers("--batch-lengths", batch_lengths)
        given = _given(
            lengths=_numbers("--lengths", lengths),
            batch_lengths=() if batches == (0,) else batches,
            batch_sizes=_numbers("--batch-sizes", batch_sizes),
            new_tokens=new_tokens,
            repeats=repeats,
            query_tokens=query_tokens,
            block_tokens=_pair("--block-tokens", block_tokens),
            seed=seed,
        )
        from blockrag.evaluation.speed.decode import DecodeSettings, measure_decode

        settings = DecodeSettings(**given)
        subject = _load(out, common.spec())
        if lengths is None:
            settings = replace(settings, lengths=_possible(subject, settings.lengths, settings.new_tokens))
        if batches is None:
            settings = replace(settings, batch_lengths=_possible(subject, settings.batch_lengths, settings.new_tokens))
        return measure_decode(subject, settings, note=note, progress=out.note)

    _report(common, measure)


@bench.command("compose", epilog=EXIT_CODES)
def compose(
    shape: Shape = _SHAPE,
    model: Model = None,
    lengths: Lengths = None,
    precisions: Annotated[
        str | None, typer.Option("--precisions", help="At rest, e.g. float16,int8.", show_default=False)
    ] = None,
    large_blocks: Annotated[
        int | None,
        typer.Option(
            "--large-blocks", min=0, help="Blocks of the case of few large ones; 0 for none.", show_default=False
        ),
    ] = None,
    repeats: Repeats = None,
    block_tokens: BlockTokens = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    seed: SeedOption = 0,
    note: Note = "",
    output: OutputDirectory = _OUTPUT,
    as_json: AsJson = False,
) -> None:
    """Bytes per second that composing moves.

    By length and precision at rest, beside the bandwidth of a plain copy, with many blocks and with few large ones.
    """
    common = _Common(shape, model, device, dtype, None, threads, seed, output, note, as_json)

    def measure(out: Output) -> dict[str, Any]:
        given = _given(
            lengths=_numbers("--lengths", lengths),
            precisions=_words(precisions),
            large_blocks=large_blocks,
            repeats=repeats,
            block_tokens=_pair("--block-tokens", block_tokens),
            seed=seed,
        )
        from blockrag.evaluation.speed.compose import ComposeSettings, measure_compose

        settings = ComposeSettings(**given)
        subject = _load(out, common.spec())
        if lengths is None:
            settings = replace(settings, lengths=_possible(subject, settings.lengths))
        return measure_compose(subject, settings, note=note, progress=out.note)

    _report(common, measure)


@bench.command("prebuild", epilog=EXIT_CODES)
def prebuild(
    shape: Shape = _SHAPE,
    model: Model = None,
    passages: Annotated[
        int | None, typer.Option("--passages", min=1, help="How many are prebuilt.", show_default=False)
    ] = None,
    to: Annotated[str | None, typer.Option("--to", help="'disk' or 'memory'.", show_default=False)] = None,
    budgets: Annotated[
        str | None,
        typer.Option("--budgets", help="Padded tokens per forward to try, e.g. 512,1K.", show_default=False),
    ] = None,
    repeats: Repeats = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    precision: Precision = None,
    threads: Threads = None,
    seed: SeedOption = 0,
    note: Note = "",
    output: OutputDirectory = _OUTPUT,
    as_json: AsJson = False,
) -> None:
    """Tokens per second that prebuilding reaches.

    Beside the fastest batched forward of the same tokens, and beside one passage at a time.
    """
    common = _Common(shape, model, device, dtype, precision, threads, seed, output, note, as_json)

    def measure(out: Output) -> dict[str, Any]:
        given = _given(passages=passages, to=to, budgets=_numbers("--budgets", budgets), repeats=repeats, seed=seed)
        from blockrag.evaluation.speed.prebuild import PrebuildSettings, measure_prebuild

        settings = PrebuildSettings(**given)
        return measure_prebuild(_load(out, common.spec()), settings, note=note, progress=out.note)

    _report(common, measure)


@bench.command("memory", epilog=EXIT_CODES)
def memory(
    shape: Shape = _SHAPE,
    model: Model = None,
    length: Annotated[
        str | None, typer.Option("--length", help="Tokens of the prompt, e.g. 8K.", show_default=False)
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option("--new-tokens", min=1, help="Tokens of the answer.", show_default=False)
    ] = None,
    query_tokens: QueryTokens = None,
    block_tokens: BlockTokens = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    precision: Precision = None,
    threads: Threads = None,
    seed: SeedOption = 0,
    note: Note = "",
    output: OutputDirectory = _OUTPUT,
    as_json: AsJson = False,
) -> None:
    """Peak memory beside the model's own.

    Of prebuilding, composing and answering, in a process of their own. Linux and CPU only.
    """
    common = _Common(shape, model, device, dtype, precision, threads, seed, output, note, as_json)

    def measure(out: Output) -> dict[str, Any]:
        lengths = _numbers("--length", length)
        given = _given(
            length=lengths[0] if lengths else None,
            new_tokens=new_tokens,
            query_tokens=query_tokens,
            block_tokens=_pair("--block-tokens", block_tokens),
            seed=seed,
        )
        from blockrag.evaluation.speed.memory import MemorySettings, measure_memory

        settings = MemorySettings(**given)
        return measure_memory(common.spec(), settings, threads=threads, note=note, progress=out.note)

    _report(common, measure)


@bench.command("all", epilog=EXIT_CODES)
def all_(
    shape: Shape = _SHAPE,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    precision: Precision = None,
    threads: Threads = None,
    seed: SeedOption = 0,
    note: Note = "",
    output: OutputDirectory = _OUTPUT,
    as_json: AsJson = False,
) -> None:
    """All of these, in about five minutes.

    With settings that a laptop finishes in that time with the default shape.
    """
    common = _Common(shape, model, device, dtype, precision, threads, seed, output, note, as_json)
    _report(common, *_short_runs(common))


def _short_runs(common: _Common) -> list[Callable[[Output], dict[str, Any]]]:
    """Each benchmark with few, short points; the model is loaded once."""
    loaded: list[Subject] = []

    def subject(out: Output) -> Subject:
        if not loaded:
            loaded.append(_load(out, common.spec()))
        return loaded[0]

    def run_ttft(out: Output) -> dict[str, Any]:
        from blockrag.evaluation.speed.ttft import TtftSettings, available_modes, measure_ttft

        lengths = _possible(subject(out), (50, 512, 1024, 2048, 4096, 8192))
        settings = TtftSettings(lengths=lengths, modes=available_modes(), repeats=3, seed=common.seed)
        return measure_ttft(subject(out), settings, note=common.note, progress=out.note)

    def run_decode(out: Output) -> dict[str, Any]:
        from blockrag.evaluation.speed.decode import DecodeSettings, measure_decode

        settings = DecodeSettings(
            lengths=_possible(subject(out), (512, 2048, 8192), 16),
            batch_lengths=_possible(subject(out), (512,), 16),
            new_tokens=16,
            seed=common.seed,
        )
        return measure_decode(subject(out), settings, note=common.note, progress=out.note)

    def run_prebuild(out: Output) -> dict[str, Any]:
        from blockrag.evaluation.speed.prebuild import PrebuildSettings, measure_prebuild

        settings = PrebuildSettings(passages=32, budgets=(512, 1024), repeats=2, seed=common.seed)
        return measure_prebuild(subject(out), settings, note=common.note, progress=out.note)

    def run_compose(out: Output) -> dict[str, Any]:
        from blockrag.evaluation.speed.compose import ComposeSettings, measure_compose

        settings = ComposeSettings(lengths=_possible(subject(out), (2048, 8192)), repeats=5, seed=common.seed)
        return measure_compose(subject(out), settings, note=common.note, progress=out.note)

    def run_memory(out: Output) -> dict[str, Any]:
        from blockrag.evaluation.speed.memory import MemorySettings, measure_memory

        settings = MemorySettings(length=_possible(subject(out), (1024, 4096), 8)[-1], seed=common.seed)
        spec = common.spec()
        return measure_memory(spec, settings, threads=common.threads, note=common.note, progress=out.note)

    return [run_ttft, run_decode, run_prebuild, run_compose, run_memory]


def _report(common: _Common, *runs: Callable[[Output], dict[str, Any]]) -> None:
    """Run benchmarks one after another; each one's files are there before the next begins."""
    with reporting(common.as_json) as out:
        results = []
        for run in runs:
            result = run(out)
            from blockrag.evaluation.speed.report import write_report

            report = write_report(result, common.output)
            out.show(report.text)
            out.note("written: " + ", ".join(str(path) for path in report.files))
            if report.missing:
                out.note(report.missing)
            results.append(result)
        out.result(results[0] if len(results) == 1 else {"results": results})


def _load(out: Output, spec: SubjectSpec) -> Subject:
    name = spec.shape if spec.model is None else spec.model
    with out.working(f"loading {name} ..."):
        return spec.load()


def _possible(subject: Subject, lengths: tuple[int, ...], room: int = 1) -> tuple[int, ...]:
    """Of the default lengths, those that the model can place."""
    limit = subject.profile.max_tokens
    possible = tuple(length for length in lengths if limit is None or length + room <= limit)
    if not possible:
        raise InputError(f"{subject.name} places {limit} tokens at most, fewer than any default; pass --lengths")
    return possible


def _given(**settings: object) -> dict[str, Any]:
    """The settings that were given; the others keep their defaults."""
    return {name: value for name, value in settings.items() if value is not None}


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """Whole numbers with commas between them; K stands for 1024."""
    if text is None:
        return None
    try:
        return tuple(_number(word) for word in text.replace(",", " ").split())
    except ValueError:
        raise InputError(f"{option} {text!r} is no list of whole numbers; write e.g. 512,1K,32K") from None


def _number(word: str) -> int:
    return 1024 * int(word[:-1]) if word[-1] in "kK" else int(word)


def _pair(option: str, text: str | None) -> tuple[int, int] | None:
    numbers = _numbers(option, text)
    if numbers is None:
        return None
    if len(numbers) != 2:
        raise InputError(f"{option} {text!r} takes two numbers, the least and the most; write e.g. 128,256")
    return numbers[0], numbers[1]


def _words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(text.replace(",", " ").split())
