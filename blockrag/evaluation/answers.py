"""Answering: one model, the same questions in several modes, each into a file of its own.

A mode is one way from a prompt to an answer; more of them can be put into `MODES`. Questions are answered in batches
whose borders depend on their numbers alone, so that a run that was interrupted ends with the file it would have made
without. Modes take turns batch by batch and share the KV states of passages.

Knows no files of questions and draws no conclusions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockrag.errors import InputError
from blockrag.evaluation.flops import ModelShape
from blockrag.evaluation.metrics import METRICS, score
from blockrag.evaluation.predictions import Prediction, Predictions, Tokens
from blockrag.evaluation.speed.machine import commit, describe_machine, versions
from blockrag.fingerprint import hash_json, hash_tensors
from blockrag.model.sampling import GenerationOptions

if TYPE_CHECKING:
    from blockrag.evaluation.questions import Asked, EvalQuestion
    from blockrag.model.answer import Generation
    from blockrag.model.block_model import Attention, BlockModel
    from blockrag.prompt import SegmentedPrompt

__all__ = ["MODES", "AnswerSettings", "Mode", "answer_questions", "modes_named"]

Generate = Callable[["BlockModel", "Sequence[SegmentedPrompt]", GenerationOptions, int], "list[Generation]"]
"""Answers prompts with a model; the last argument is how many may decode together."""


@dataclass(frozen=True, slots=True)
class Mode:
    """One way to answer.

    Args:
        name: What options and tables call it.
        description: One line for the report.
        generate: Answers prompts.
        reuses: Whether passages are computed once for all questions.
    """

    name: str
    description: str
    generate: Generate
    reuses: bool


@dataclass(frozen=True, slots=True)
class AnswerSettings:
    """How questions are answered, greedily.

    Args:
        max_new_tokens: Tokens after which an answer ends; the paper's evaluation takes 200.
        batch_size: Questions that are answered together.
        allow_special: Whether control tokens spelled in ready blocks are recognized.

    Raises:
        InputError: A value is out of range.
    """

    max_new_tokens: int = 200
    batch_size: int = 16
    allow_special: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise InputError(
                f"max_new_tokens={self.max_new_tokens} and batch_size={self.batch_size} must both be at least 1"
            )


def _generate(
    model: BlockModel,
    prompts: Sequence[SegmentedPrompt],
    options: GenerationOptions,
    batch_size: int,
    *,
    attention: Attention,
    reencode: bool,
) -> list[Generation]:
    return model.generate(prompts, options, attention=attention, reencode=reencode, batch_size=batch_size)


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode(
            "full",
            "every token sees all tokens before it",
            partial(_generate, attention="full", reencode=True),
            reuses=False,
        ),
        Mode(
            "block",
            "passages see only themselves; their keys are moved to their positions",
            partial(_generate, attention="block", reencode=True),
            reuses=True,
        ),
        Mode(
            "block-no-reencode",
            "the same with the keys of every passage left at the positions 0, 1, ... (the paper's w/o-pos)",
            partial(_generate, attention="block", reencode=False),
            reuses=True,
        ),
    )
}
"""The modes by name, in the order of tables."""


def modes_named(names: Sequence[str]) -> list[Mode]:
    """The modes of these names, each once, in the order given.

    Raises:
        InputError: There is no such mode, or no name.
    """
    unknown = [name for name in names if name not in MODES]
    if unknown or not names:
        raise InputError(f"unknown modes {unknown}; pass some of: {', '.join(MODES)}")
    return [MODES[name] for name in dict.fromkeys(names)]


def answer_questions(
    model: BlockModel,
    asked: Asked,
    modes: Sequence[Mode],
    settings: AnswerSettings,
    directory: Path,
    *,
    label: str = "",
    made: Mapping[str, Any] | None = None,
    progress: Callable[[str, int], None] = lambda mode, done: None,
) -> list[Path]:
    """Answer all questions in all modes.

    Args:
        model: The model; with a store of its own, which the modes share.
        asked: The questions.
        modes: The ways to answer.
        settings: How.
        directory: Where `MODE.jsonl` is made, or continued.
        label: What the report calls the model; by default its name.
        made: Where, when and with what, for the header; by default here, today, with this installation.
        progress: Told after each batch how many questions are done in a mode.

    Returns:
        The files, one per mode.

    Raises:
        InputError: A file belongs to another run.
        UnsupportedModelError: The model cannot be composed and a mode needs it.
    """
    described = _describe(model, label or model.name)
    made = _made_here(model) if made is None else made
    data = asked.describe()
    with ExitStack() as stack:
        files = []
        for mode in modes:
            header = {"model": described, "mode": mode.name, "data": data, "options": asdict(settings), "made": made}
            path = directory / f"{mode.name}.jsonl"
            files.append((mode, stack.enter_context(Predictions(path, header))))
        if any(file.done < len(asked.questions) for _, file in files):
            _run(model, asked.questions, files, settings, progress)
        return [file.path for _, file in files]


def _run(
    model: BlockModel,
    questions: Sequence[EvalQuestion],
    files: Sequence[tuple[Mode, Predictions]],
    settings: AnswerSettings,
    progress: Callable[[str, int], None],
) -> None:
    options = GenerationOptions(max_new_tokens=settings.max_new_tokens)
    known: set[str] = set()
    for first in range(0, len(questions), settings.batch_size):
        batch = questions[first : first + settings.batch_size]
        prompts = [_prompt(model, question, settings) for question in batch]
        costs = [None if isinstance(prompt, InputError) else _cost(prompt, known) for prompt in prompts]
        for mode, file in files:
            if file.done >= first + len(batch):
                continue
            usable = [prompt for prompt in prompts if not isinstance(prompt, InputError)]
            # All of a batch again, where only some of it was written: in other company, rounding may differ.
            generations = iter(mode.generate(model, usable, options, settings.batch_size) if usable else [])
            for question, prompt, cost in zip(batch, prompts, costs, strict=True):
                if isinstance(prompt, InputError) or cost is None:
                    made = _failed(question, mode, str(prompt))
                else:
                    made = _answered(question, mode, prompt, cost, next(generations))
                if question.index >= file.done:
                    file.append(made)
            progress(mode.name, file.done)


def _prompt(model: BlockModel, question: EvalQuestion, settings: AnswerSettings) -> SegmentedPrompt | InputError:
    """The prompt, or why the model cannot take it."""
    template, tokenizer = model.template, model.tokenizer
    try:
        if question.blocks:
            prompt = template.segment_blocks(tokenizer, question.blocks, allow_special=settings.allow_special)
        else:
            prompt = template.segment(tokenizer, passages=question.passages, question=question.question)
        model.room_after(prompt.num_tokens)
    except InputError as error:
        return error
    return prompt


def _cost(prompt: SegmentedPrompt, known: set[str]) -> tuple[int, tuple[int, ...]]:
    """Tokens reused and lengths missed, as `Tokens` counts them; the prompt's blocks are known from here on."""
    reused, missed = 0, []
    for block in prompt.local_blocks:
        # The tokens themselves would be gigabytes where a file has a million passages.
        digest = hash_json(block.token_ids)
        if digest in known:
            reused += len(block)
        else:
            known.add(digest)
            missed.append(len(block))
    return reused, tuple(missed)


def _answered(
    question: EvalQuestion,
    mode: Mode,
    prompt: SegmentedPrompt,
    cost: tuple[int, tuple[int, ...]],
    generation: Generation,
) -> Prediction:
    if mode.reuses:
        reused, missed = cost
        query = prompt.num_tokens - reused - sum(missed)
        tokens = Tokens(prompt.num_tokens, len(prompt.local_blocks), reused, missed, query, len(generation.token_ids))
    else:
        whole = prompt.as_full().num_tokens
        tokens = Tokens(whole, 0, 0, (), whole, len(generation.token_ids))
    return Prediction(
        # Without the text that says that blocks follow: that is the model's, not the benchmark's.
        **_asked(question, mode, prompt.as_full().text if question.blocks else ""),
        prediction=generation.text,
        scores=score(generation.text, question.answers).as_json() if question.answers else {},
        tokens=tokens,
        finish_reason=generation.finish_reason,
    )


def _failed(question: EvalQuestion, mode: Mode, error: str) -> Prediction:
    return Prediction(
        **_asked(question, mode, "".join(question.blocks)),
        prediction="",
        scores=dict.fromkeys(METRICS, 0.0) if question.answers else {},
        tokens=Tokens(0, 0, 0, (), 0, 0),
        error=error,
    )


def _asked(question: EvalQuestion, mode: Mode, prompt: str) -> dict[str, Any]:
    return {
        "index": question.index,
        "line": question.line,
        "id": question.id,
        "kind": question.kind,
        "mode": mode.name,
        "question": question.question,
        "answers": question.answers,
        "prompt": prompt,
    }


def _made_here(model: BlockModel) -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        **commit(),
        "versions": versions(),
        "machine": describe_machine(model.model.device.type),
    }


def _describe(model: BlockModel, label: str) -> dict[str, Any]:
    try:
        shape: dict[str, int] | None = asdict(ModelShape.from_config(model.model.config))
    except InputError:
        # Another architecture: its FLOPs are not counted.
        shape = None
    composable = model.profile is not None
    return {
        "label": label,
        "name": model.name,
        "fingerprint": model.fingerprint.digest if composable else hash_tensors(model.model.state_dict().items()),
        "template": model.template.name,
        "template_digest": model.template.digest(),
        "compute_dtype": str(model.model.dtype).removeprefix("torch."),
        "precision_at_rest": model.precision,
        "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
        "block_fine_tuned": model.facts.block_fine_tuned,
        "trained_blocks": model.facts.max_blocks,
        "trained_tokens": model.facts.max_tokens,
        "shape": shape,
    }
