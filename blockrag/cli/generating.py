"""`blockrag generate`: a file of prompts to a file of answers, resumable line by line."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockrag.cli.answers import usage_json
from blockrag.cli.batch import BatchLine, open_output, read_lines, result_of
from blockrag.cli.directory import model_name
from blockrag.cli.options import (
    AsJson,
    AttentionChoice,
    Device,
    Dtype,
    MaxNewTokens,
    NamespaceOption,
    OnMissChoice,
    OnMissOption,
    Seed,
    Temperature,
    generation_options,
)
from blockrag.cli.output import PARTLY_FAILED, Output, quiet_transformers, reporting
from blockrag.errors import InputError, PromptError

if TYPE_CHECKING:
    from io import BufferedRandom

    from transformers import PreTrainedTokenizerBase

    from blockrag.model.answer import Generation
    from blockrag.model.block_model import BlockModel
    from blockrag.model.sampling import GenerationOptions
    from blockrag.prompt import Block, SegmentedPrompt

__all__ = ["generate"]


class Format(str, Enum):
    """How a line says its prompt."""

    auto = "auto"
    rag = "rag"
    text = "text"
    blocks = "blocks"
    messages = "messages"


_KEYS = {"rag": "prompt", "text": "prompt", "blocks": "blocks", "messages": "messages"}

ModelOption = Annotated[str, typer.Option("--model", help="'demo', a hub id or a directory.")]
Input = Annotated[Path, typer.Option("--input", help="One JSON object per line.")]
OutputFile = Annotated[Path, typer.Option("--output", help="Result file; a file that is there is continued.")]
FormatOption = Annotated[Format, typer.Option("--format", help="What a line holds; see above.")]
Attention = Annotated[AttentionChoice, typer.Option("--attention", help="'block' or 'full'.")]
Store = Annotated[
    str | None,
    typer.Option("--store", help="Where blocks are kept, e.g. disk:///path?max_bytes=200GB; by default in memory."),
]
BatchSize = Annotated[
    int,
    typer.Option("--batch-size", min=1, help="Lines that are answered together, and then written."),
]
AllowSpecial = Annotated[
    bool,
    typer.Option("--allow-special", help="Recognize control tokens spelled in text and blocks; only if you trust it."),
]


def generate(
    model: ModelOption,
    input_file: Input,
    output_file: OutputFile,
    format_: FormatOption = Format.auto,
    attention: Attention = AttentionChoice.block,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    store: Store = None,
    namespace: NamespaceOption = "",
    on_miss: OnMissOption = OnMissChoice.compute,
    batch_size: BatchSize = 16,
    allow_special: AllowSpecial = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Answer a file of prompts; resumable.

    \b
    A line is a JSON object with exactly one of
      prompt    a string: a RAG prompt in the model's own form (its passages
                become blocks), or any other text (one global block, as it is,
                behind the tokenizer's begin-of-sequence token if it has one)
      blocks    a list of strings, the last one global; nothing is added
      messages  a list of {"role", "content"}; one block per turn
    --format says which: rag (must parse), text, blocks, messages, or auto, which
    goes by the key and takes a prompt that is no RAG prompt as text.

    The output keeps every field and adds generated, usage and finish_reason, or error for a line that failed. Lines
    the output has already are skipped, so a run that was killed goes on where it stopped. Lines are answered
    --batch-size at a time; the answers are those of one at a time.
    """  # noqa: D301 (the command line needs the character itself: it keeps the lines behind it apart)
    with reporting(as_json) as out:
        options = generation_options(max_new_tokens, temperature, seed)
        name = model_name(model)
        _check_files(input_file, output_file)
        lines = read_lines(input_file)
        file, done, failed = open_output(output_file, lines)
        with file:
            first = next(lines, None)
            run = _Run(out, file, options, format_, allow_special, skipped=done, failed=failed, failed_before=failed)
            started = time.perf_counter()
            if first is not None:
                language_model = _load(
                    out, name, attention, store, namespace=namespace, on_miss=on_miss, device=device, dtype=dtype
                )
                with closing(language_model.store):
                    lines = chain([first], lines)
                    while batch := list(islice(lines, batch_size)):
                        run.answer(batch, language_model)
        _summarize(out, run, input_file, output_file, time.perf_counter() - started)


@dataclass(slots=True)
class _Run:
    """One run over the lines, and what it counted."""

    out: Output
    file: BufferedRandom
    options: GenerationOptions
    format: Format
    allow_special: bool
    skipped: int
    failed: int
    failed_before: int
    generated: int = 0
    usage: dict[str, int] = field(default_factory=dict)

    def answer(self, lines: Sequence[BatchLine], model: BlockModel) -> None:
        """Answer some lines together, and write their results."""
        prompts = [self._prompt(line, model) for line in lines]
        usable = [prompt for prompt in prompts if not isinstance(prompt, InputError)]
        results = iter(self._generate(usable, model))
        for line, prompt in zip(lines, prompts, strict=True):
            self._note(line, prompt if isinstance(prompt, InputError) else next(results))

    def _prompt(self, line: BatchLine, model: BlockModel) -> SegmentedPrompt | InputError:
        try:
            if line.problem:
                raise PromptError(line.problem)
            return _segment(line.fields, model, self.format, allow_special=self.allow_special)
        except InputError as error:
            return error

    def _generate(self, prompts: Sequence[SegmentedPrompt], model: BlockModel) -> list[Generation | InputError]:
        try:
            return list(model.generate(prompts, self.options, batch_size=max(1, len(prompts))))
        except InputError as error:
            # One of them is too long: the others still have an answer.
            return [error] if len(prompts) == 1 else [self._generate([one], model)[0] for one in prompts]

    def _note(self, line: BatchLine, result: Generation | InputError) -> None:
        if isinstance(result, InputError):
            self.failed += 1
            self._write(line, {"error": str(result)})
            self.out.error(f"line {line.number}: {result}")
            return
        self.generated += 1
        usage = usage_json(result.usage)
        self.usage = {name: self.usage.get(name, 0) + value for name, value in usage.items()}
        self._write(line, {"generated": result.text, "usage": usage, "finish_reason": result.finish_reason})

    def _write(self, line: BatchLine, added: Mapping[str, object]) -> None:
        self.file.write(result_of(line, added))
        self.file.flush()


def _check_files(source: Path, target: Path) -> None:
    if not source.is_file():
        raise InputError(f"there is no file {str(source)!r}; pass a file with one JSON object per line")
    if target.is_dir():
        raise InputError(f"{str(target)!r} is a directory; pass a file as --output")
    if target.exists() and target.samefile(source):
        raise InputError(f"--input and --output are the same file, {str(source)!r}; pass another --output")


def _load(
    out: Output,
    name: str,
    attention: AttentionChoice,
    store: str | None,
    *,
    namespace: str,
    on_miss: OnMissChoice,
    device: str,
    dtype: str,
) -> BlockModel:
    with out.working(f"loading {name} ..."):
        from blockrag.model.block_model import BlockModel
        from blockrag.stores import open_store

        quiet_transformers()
        opened = None if store is None else open_store(store)
        return BlockModel.from_pretrained(
            name,
            attention=attention.value,
            store=opened,
            namespace=namespace,
            on_miss=on_miss.value,
            device=device,
            dtype=dtype,
        )


def _segment(fields: Mapping[str, Any], model: BlockModel, format_: Format, *, allow_special: bool) -> SegmentedPrompt:
    """The blocks of one line.

    Raises:
        PromptError: The line lacks what its format needs, or that is malformed.
    """
    key = _KEYS.get(format_.value) or _only_key(fields)
    if key not in fields:
        raise PromptError(f"there is no {key!r}, which --format {format_.value} needs (keys: {', '.join(fields)})")
    value = fields[key]
    template, tokenizer = model.template, model.tokenizer
    if key == "prompt":
        return _segment_prompt(value, model, format_, allow_special=allow_special)
    if not isinstance(value, list):
        raise PromptError(f"{key} must be a list, got {value!r:.60}")
    if key == "messages":
        return template.segment_messages(tokenizer, value)
    return template.segment_blocks(tokenizer, value, allow_special=allow_special)


def _segment_prompt(value: object, model: BlockModel, format_: Format, *, allow_special: bool) -> SegmentedPrompt:
    from blockrag.prompt import parse_rag_prompt

    template, tokenizer = model.template, model.tokenizer
    if not isinstance(value, str):
        raise PromptError(f"prompt must be a string, got {value!r:.60}")
    if format_ is not Format.text:
        try:
            passages, question = parse_rag_prompt(value, template)
        except PromptError:
            if format_ is Format.rag:
                raise
        else:
            return template.segment(tokenizer, passages=passages, question=question)
    prompt = template.segment_blocks(tokenizer, [value], allow_special=allow_special)
    return replace(prompt, blocks=(_opened(prompt.blocks[0], model.tokenizer),))


def _opened(block: Block, tokenizer: PreTrainedTokenizerBase) -> Block:
    """The block behind the begin-of-sequence token, where the tokenizer opens every text with one."""
    bos = tokenizer.bos_token_id
    opens = bos is not None and list(tokenizer("a").input_ids[:1]) == [bos]
    if not opens or block.token_ids[0] == bos:
        return block
    return replace(block, token_ids=(bos, *block.token_ids), text=f"{tokenizer.bos_token}{block.text}")


def _only_key(fields: Mapping[str, Any]) -> str:
    found = [key for key in ("prompt", "blocks", "messages") if key in fields]
    if len(found) != 1:
        raise PromptError(
            f"a line needs exactly one of prompt, blocks and messages, got {' and '.join(found) or 'none'} "
            f"(keys: {', '.join(fields)}); pass --format to say which counts"
        )
    return found[0]


def _summarize(out: Output, run: _Run, source: Path, target: Path, seconds: float) -> None:
    total = run.skipped + run.generated + run.failed - run.failed_before
    reused, computed = run.usage.get("tokens_reused", 0), run.usage.get("tokens_computed", 0)
    kept = f" ({run.usage['tokens_kept']:,} kept composed)" if run.usage.get("tokens_kept") else ""
    out.show(f"{run.generated:,} lines answered in {seconds:.1f} s, {run.skipped:,} were there already: {target}")
    if run.generated:
        out.show(f"{reused:,} prompt tokens reused{kept}, {computed:,} computed, {run.usage['new_tokens']:,} generated")
    out.result(
        {
            "input": str(source),
            "output": str(target),
            "generated": run.generated,
            "skipped": run.skipped,
            "failed": run.failed,
            "seconds": seconds,
            "usage": run.usage,
        }
    )
    if run.failed:
        out.exit_code = PARTLY_FAILED
        out.error(f"{run.failed:,} of {total:,} lines failed; their 'error' in {target} says why")
