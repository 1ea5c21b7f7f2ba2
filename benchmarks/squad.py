"""Real text from random weights: a small Llama on SQuAD, in full attention, then fine-tuned for blocks, then asked.

    python benchmarks/squad.py --train squad-train-v1.1.json.gz --dev squad-dev-v1.1.json --out DIR

A byte-level BPE and a model of 5 to 16 M parameters are made from the training file alone. The model is trained on
lines of `--gold` paragraphs with all their questions, first in full attention with every token in the loss, then in
both attentions. Before and after that second run it answers questions of the other file in three modes, each over its
own paragraph and 4 or 9 random ones. Trains on a GPU where there is one.

The same command goes on where it was stopped. `DIR/squad.json` and `DIR/squad.md` hold numbers alone; everything else
in DIR holds text of SQuAD (CC BY-SA 4.0).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from blockrag.errors import InputError
from blockrag.evaluation.accuracy import ALL, summarize
from blockrag.evaluation.answers import MODES, AnswerSettings, answer_questions
from blockrag.evaluation.questions import Selection, read_questions
from blockrag.evaluation.speed.machine import commit, describe_machine, versions
from blockrag.evaluation.speed.text import count, place, table
from blockrag.finetune.data.lines import RagLine, read_rag_lines, write_lines
from blockrag.finetune.data.squad import read_squad
from blockrag.finetune.progress import duration
from blockrag.finetune.resuming import last_checkpoint
from blockrag.finetune.run import finetune
from blockrag.finetune.saving import CHECKPOINTS, LOG_FILE, data_file
from blockrag.finetune.settings import FinetuneSettings
from blockrag.model.block_model import BlockModel
from blockrag.model.facts import FACTS_FILE, BlockAttentionFacts, NotBlockFineTunedWarning, save_facts
from blockrag.model.trained import BeyondTrainingWarning
from blockrag.prompt import TEMPLATES
from blockrag.stores import MemoryStore

SPECIAL = ("<pad>", "<bos>", "<eos>")
HEAD_SIZE = 64
RESUMED = "resumed"
MAX_TOKENS = 4096
PASSAGES = (5, 10)
STAGES = {"before": "full attention", "after": "block fine-tuning"}
"""The two models, and the training that ends with each."""
METRICS = {"em": "EM", "substr_em": "Substr-EM", "f1": "F1"}
ATTENTIONS = ("full", "block")

# With fewer passes over the training file nobody should read the scores: small models take tens.
FEW_PASSES = 10
# A run that could learn: so many passes in full attention, and so many of each attention behind them.
FULL_PASSES, BLOCK_PASSES = 20, 5
# Of an H100, in bfloat16 without sparsity, and the share of them that a model this small is assumed to reach.
H100_FLOPS, ASSUMED_SHARE = 989e12, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What decides the numbers; a directory belongs to one set of them. See the help of the command.

    Raises:
        InputError: The width is no number of whole heads.
    """

    hidden: int = 256
    layers: int = 6
    vocabulary: int = 4096
    gold: int = 10
    deals: int = 1
    steps: int = 1000
    block_steps: int = 300
    batch_rows: int = 1
    learning_rate: float = 1.5e-3
    block_learning_rate: float = 1e-3
    prompt_weight: float = 0.5
    bf16: bool = False
    questions: int = 200
    held_out: int = 12
    max_new_tokens: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        if self.hidden < HEAD_SIZE or self.hidden % HEAD_SIZE:
            raise InputError(f"hidden={self.hidden} must be a multiple of {HEAD_SIZE}, the size of a head")


def main() -> int:
    """Make, train, ask; write both files and print the tables."""
    arguments = _parser().parse_args()
    options = Options(**{field.name: getattr(arguments, field.name) for field in fields(Options)})
    transformers_logging.disable_progress_bar()
    result = run(arguments.train, arguments.dev, arguments.out, options, note=arguments.note)
    text = markdown(result)
    (arguments.out / "squad.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", "utf-8")
    (arguments.out / "squad.md").write_text(text, "utf-8")
    print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="SQuAD to train on")
    parser.add_argument("--dev", type=Path, required=True, help="SQuAD to ask")
    parser.add_argument("--out", type=Path, required=True, help="directory; what is there is continued")
    parser.add_argument("--note", default="", help="kept with the result")
    helps = {
        "hidden": f"width, a multiple of {HEAD_SIZE}",
        "layers": "layers",
        "vocabulary": "tokens of the BPE",
        "gold": "paragraphs to a training line, with all their questions",
        "deals": "how often the paragraphs are dealt out to lines anew",
        "steps": "steps in full attention",
        "block_steps": "steps of block fine-tuning",
        "batch_rows": "lines to a step",
        "learning_rate": "in full attention",
        "block_learning_rate": "of block fine-tuning",
        "prompt_weight": "what a token of the prompt counts in the loss, beside 1 for one of an answer",
        "bf16": "compute in bfloat16 while training",
        "questions": "questions to ask",
        "held_out": "lines of --dev whose answers' loss is measured behind each training",
        "max_new_tokens": "most tokens of an answer",
        "seed": "draws weights, lines, and what is asked",
    }
    for field in fields(Options):
        name, described = "--" + field.name.replace("_", "-"), helps[field.name]
        if isinstance(field.default, bool):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=field.default, help=described)
        else:
            described += f" ({field.default})"
            parser.add_argument(name, type=type(field.default), default=field.default, help=described)
    return parser


def run(train: Path, dev: Path, out: Path, options: Options, *, note: str = "") -> dict[str, Any]:
    """Everything, from where it was stopped.

    Args:
        train: SQuAD to train on, in any of the forms of `read_squad`.
        dev: SQuAD to ask.
        out: The directory.
        options: The numbers.
        note: Kept with the result.

    Returns:
        The result, as JSON types; no text of the data.

    Raises:
        DataError: A file is malformed.
        InputError: The directory belongs to other options or files.
    """
    _claim(out, {"train": train.name, "dev": dev.name, **asdict(options)})
    sources = _lines(train, dev, out / "data", options)
    if not (out / "untrained" / FACTS_FILE).is_file():
        _save_untrained(out / "untrained", out / "data" / "train.jsonl", options)
    full, both = _settings(options)
    training = [
        _train(out / "untrained", out / "before", out / "data", full),
        _train(out / "before", out / "after", out / "data", both),
    ]
    asked = {model: _ask(model, out, options) for model in STAGES}
    return {
        "schema": 1,
        "benchmark": "squad",
        "command": _command(train, dev, options),
        "note": note,
        **commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "versions": versions(),
        "machine": describe_machine("cuda" if torch.cuda.is_available() else "cpu"),
        "options": asdict(options),
        "sources": sources,
        "parameters": training[0]["parameters"],
        "training": training,
        "asked": asked,
        "learns": _learning_run(train, dev, options, training[0]),
    }


def _settings(options: Options) -> tuple[FinetuneSettings, FinetuneSettings]:
    """Of the run in full attention, and of block fine-tuning."""
    full = FinetuneSettings(
        variants="full",
        steps=options.steps,
        batch_rows=options.batch_rows,
        max_tokens=MAX_TOKENS,
        prompt_weight=options.prompt_weight,
        optimizer="muon",
        learning_rate=options.learning_rate,
        schedule="hold-then-linear",
        weight_decay=0.01,
        betas=(0.9, 0.98),
        seed=options.seed,
        bf16=options.bf16,
        save_steps=50,
        save_limit=1,
        log_steps=max(1, min(10, options.steps // 4)),
    )
    return full, replace(
        full,
        variants="both",
        steps=options.block_steps,
        learning_rate=options.block_learning_rate,
        decay=0.7,
        log_steps=max(1, min(10, options.block_steps // 4)),
    )


def _claim(out: Path, wanted: Mapping[str, Any]) -> None:
    """Make the directory this run's.

    Raises:
        InputError: It is another's.
    """
    path = out / "options.json"
    if path.is_file():
        found = json.loads(path.read_text("utf-8"))
        other = [f"{name}={found.get(name)!r}" for name, value in wanted.items() if found.get(name) != value]
        if other:
            raise InputError(f"{out} holds a run with {', '.join(other)}; pass the same options, or another --out")
        return
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(wanted, indent=1) + "\n", "utf-8")


def _lines(train: Path, dev: Path, directory: Path, options: Options) -> dict[str, Any]:
    """Write what is trained, asked and watched; returns what the result says of the two files."""
    done = directory / "sources.json"
    if done.is_file():
        sources: dict[str, Any] = json.loads(done.read_text("utf-8"))
        return sources
    _say(f"reading {train.name} and {dev.name}")
    dealt = (
        line
        for deal in range(options.deals)
        for line in read_squad(train, gold=options.gold, seed=options.seed * 1_000_003 + deal)
    )
    trained = write_lines(directory / "train.jsonl", dealt)
    asked = list(read_squad(dev, gold=1, distractors=max(PASSAGES) - 1, seed=options.seed))
    watched = random.Random(options.seed).sample(asked, min(options.held_out, len(asked)))
    write_lines(directory / "watched.jsonl", watched)
    write_lines(directory / "dev.jsonl", map(_own_first, asked))
    sources = {"train": data_file(train, trained), "dev": data_file(dev, len(asked))}
    done.write_text(json.dumps(sources, indent=1) + "\n", "utf-8")
    return sources


def _own_first(line: RagLine) -> RagLine:
    """The line with the paragraph its questions are about in front.

    The first 5 of 10 passages then hold it as well, so that the same questions can be asked over 5; `Selection` puts
    them in random order.
    """
    return replace(line, passages=tuple(sorted(line.passages, key=lambda one: not one.supports)))


def _save_untrained(out: Path, data: Path, options: Options) -> None:
    """Write a tokenizer of the training lines and a Llama with random weights, in Hugging Face's layout."""
    _say("learning the tokenizer")
    texts: set[str] = set()
    for _, line in read_rag_lines(data):
        texts.update(f"{one.passage.title}\n{one.passage.text}\n" for one in line.passages)
        texts.update(question.question for question in line.questions)
    learned = ByteLevelBPETokenizer()
    # Each text once, as deals repeat them, and sorted: a set has no order that stays.
    learned.train_from_iterator(
        sorted(texts), vocab_size=options.vocabulary, special_tokens=list(SPECIAL), show_progress=False
    )
    pad, bos, eos = SPECIAL
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(learned.to_str()),
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_TOKENS,
    )
    torch.manual_seed(options.seed)
    model = _model(options, len(tokenizer))
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # Last: it says that the others are there.
    save_facts(BlockAttentionFacts(block_fine_tuned=False, template=TEMPLATES["plain"]), out)


def _model(options: Options, vocabulary: int, *, device: str = "cpu") -> LlamaForCausalLM:
    """A Llama with random weights; grouped-query attention where the heads come in pairs."""
    heads = options.hidden // HEAD_SIZE
    special = {f"{name}_token_id": number for number, name in enumerate(("pad", "bos", "eos"))}
    with torch.device(device):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=options.hidden,
                intermediate_size=3 * options.hidden,
                num_hidden_layers=options.layers,
                num_attention_heads=heads,
                num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
                max_position_embeddings=MAX_TOKENS,
                tie_word_embeddings=True,
                **special,
            )
        )
    model.generation_config = GenerationConfig(do_sample=False, **special)
    return model


def _train(start: Path, out: Path, data: Path, settings: FinetuneSettings) -> dict[str, Any]:
    """Train, unless it is done; returns what the result says of it."""
    if not (out / "config.json").is_file():
        _say(f"training, {STAGES[out.name]}")
        resume = last_checkpoint(out) is not None
        if resume:
            # Its log will only know the time since then.
            (out / RESUMED).touch()
        finetune(
            start,
            [data / "train.jsonl"],
            out,
            settings,
            eval_data=[data / "watched.jsonl"],
            resume=resume,
            too_long="skip",
            progress=_say,
        )
        # Only for resuming, and three times the size of the model.
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    log = json.loads((out / LOG_FILE).read_text("utf-8"))
    losses = [entry for entry in log["history"] if "loss" in entry]
    watched = next(entry for entry in reversed(log["history"]) if "eval_full_loss" in entry)
    passes = log["steps"] * settings.batch_rows / log["rows"]
    return {
        "stage": STAGES[out.name],
        "parameters": log["parameters"],
        "variants": settings.variants,
        "steps": log["steps"],
        "lines_per_step": settings.batch_rows,
        "rows": log["rows"],
        "skipped": log["skipped"],
        "tokens": log["tokens_seen"],
        "passes": passes,
        "pass_tokens": round(log["tokens_seen"] / passes),
        "seconds": None if (out / RESUMED).is_file() else log["seconds"],
        "losses": [[entry["step"], entry["loss"]] for entry in losses],
        "watched": {name.removeprefix("eval_"): value for name, value in watched.items() if name.startswith("eval_")},
        "settings": settings.to_dict(),
    }


def _ask(model: str, out: Path, options: Options) -> dict[str, Any]:
    """Answer the questions in all modes; the result of each number of passages, compared with full attention."""
    modes = list(MODES.values())
    settings = AnswerSettings(max_new_tokens=options.max_new_tokens)
    results = {}
    with warnings.catch_warnings():
        # What they warn of is what is measured; the result says it.
        for expected in (NotBlockFineTunedWarning, BeyondTrainingWarning):
            warnings.simplefilter("ignore", expected)
        # Without a limit: the paragraphs of one file, which both numbers of passages share.
        loaded = BlockModel.from_pretrained(out / model, store=MemoryStore())
        for passages in PASSAGES:
            asked = read_questions(
                out / "data" / "dev.jsonl", Selection(passages, "shuffled", options.questions, options.seed)
            )
            files = answer_questions(
                loaded,
                asked,
                modes,
                settings,
                out / "answers" / f"{passages}-passages" / model,
                label=model,
                progress=_tell(f"{model}, {passages} passages"),
            )
            results[str(passages)] = summarize(files)
        loaded.store.close()
    return results


def _learning_run(train: Path, dev: Path, options: Options, full: Mapping[str, Any]) -> dict[str, Any]:
    """What a run that could learn something would take on one H100, by arithmetic.

    Training takes 6 operations per weight and token, and attention 12 per layer, channel and position seen; of its row
    a token sees half on average, under the block mask less.

    Args:
        train: The training file.
        dev: The file that is asked.
        options: Of the run that was made.
        full: What that run says of its training in full attention.
    """
    rows, tokens = full["rows"] / options.deals, full["pass_tokens"] / options.deals
    batch = 8
    learning = replace(
        options,
        hidden=384,
        layers=8,
        deals=FULL_PASSES,
        steps=math.ceil(FULL_PASSES * rows / batch),
        block_steps=math.ceil(2 * BLOCK_PASSES * rows / batch),
        batch_rows=batch,
        bf16=True,
        questions=2000,
        held_out=100,
    )
    parameters = sum(weight.numel() for weight in _model(learning, learning.vocabulary, device="meta").parameters())
    passes = FULL_PASSES + 2 * BLOCK_PASSES
    operations = 6 * parameters + 12 * learning.layers * learning.hidden * tokens / rows / 2
    flops = passes * tokens * operations
    return {
        "command": _command(train, dev, learning),
        "parameters": parameters,
        "passes": passes,
        "tokens": round(passes * tokens),
        "flops": flops,
        "assumed_share": ASSUMED_SHARE,
        "seconds": flops / (ASSUMED_SHARE * H100_FLOPS),
    }


def _command(train: Path, dev: Path, options: Options) -> str:
    """What repeats the run; of paths only the last part is given."""
    words = [f"python benchmarks/squad.py --train {train.name} --dev {dev.name} --out DIR"]
    for field in fields(Options):
        value = getattr(options, field.name)
        if value != field.default:
            name = field.name.replace("_", "-")
            words.append(f"--{name}" if value is True else f"--{name} {value}")
    return " ".join(words)


def markdown(result: dict[str, Any]) -> str:
    """The tables, what they say and do not say, and how they were made."""
    training, options = result["training"], result["options"]
    sections = [
        f"# SQuAD from random weights: {count(result['parameters'])} parameters",
        *_label(result),
        "## Training",
        "Loss at the end of each run and on lines of the other file: nats per token of an answer, with the share of "
        f"answers that greedy decoding would write exactly. A guess among {options['vocabulary']:,} tokens has "
        f"{math.log(options['vocabulary']):.2f}.",
        _training_table(training),
        f"## Answers to {options['questions']:,} questions",
        "Percent ± one standard error; Δ against the same model in full attention, question by question, with its own "
        "error. *before*: trained in full attention alone. *after*: block-fine-tuned, which is also more training. "
        "Each question is asked over its own paragraph and random others, in random order.",
    ]
    for passages in PASSAGES:
        sections += [f"### {passages} passages", _answers_table(result["asked"], str(passages))]
    sections += ["## A run that could learn", _learns(result["learns"]), "## How it was made", _provenance(result)]
    return "\n\n".join(sections) + "\n"


def _label(result: Mapping[str, Any]) -> list[str]:
    """What a reader must know before the scores."""
    # A pass in both attentions reads every line twice.
    passes = sum(stage["passes"] * (2 if stage["variants"] == "both" else 1) for stage in result["training"])
    tokens = sum(stage["tokens"] for stage in result["training"])
    if passes >= FEW_PASSES:
        return []
    device = "GPU" if "gpu" in result["machine"] else "CPU"
    return [
        f"**A {device} run that proves the command, far too short to learn: {tokens:,} tokens are "
        f"{passes:.2f} passes over the training file, where small models take tens. The scores below are those of "
        "a model that cannot answer; neither they nor their differences say anything about block attention.**"
    ]


def _training_table(training: Sequence[Mapping[str, Any]]) -> str:
    header = [
        *("run", "attention", "steps", "tokens", "passes", "time", "tokens/s", "loss, all tokens"),
        *("answers, full", "answers, block"),
    ]
    rows = []
    for stage in training:
        watched, seconds = stage["watched"], stage["seconds"]
        rows.append(
            [
                stage["stage"],
                stage["variants"],
                f"{stage['steps']:,} x {stage['lines_per_step']}",
                f"{stage['tokens']:,}",
                f"{stage['passes']:.2f}",
                *(("-", "-") if seconds is None else (duration(seconds), f"{stage['tokens'] / seconds:,.0f}")),
                f"{stage['losses'][0][1]:.2f} to {stage['losses'][-1][1]:.2f}",
                *(f"{watched[f'{mode}_loss']:.2f} ({watched[f'{mode}_exact_match']:.1f} %)" for mode in ATTENTIONS),
            ]
        )
    return table(header, rows)


def _answers_table(asked: Mapping[str, Any], passages: str) -> str:
    header = ["model", "mode", *METRICS.values(), *(f"Δ {label}" for label in METRICS.values()), "cut off"]
    rows = []
    for model in STAGES:
        for row in asked[model][passages]["rows"]:
            found = row["groups"][ALL]
            scores = [_percent(found["scores"][metric]) for metric in METRICS]
            differences = [_percent(found["differences"][metric], "+") for metric in METRICS if found["differences"]]
            rows.append([model, row["mode"], *scores, *(differences or ["reference"] * 3), f"{row['cut_off']:,}"])
    return table(header, rows)


def _percent(estimate: Mapping[str, Any], sign: str = "") -> str:
    error = "" if estimate["se"] is None else f" ± {100 * estimate['se']:.1f}"
    return f"{100 * estimate['value']:{sign}.1f}{error}".replace("-", "−")


def _learns(learns: Mapping[str, Any]) -> str:
    return (
        f"Not run; by arithmetic alone. `{learns['command']}`: {count(learns['parameters'])} parameters, "
        f"{learns['tokens'] / 1e6:,.0f} million tokens, which are {FULL_PASSES} passes in full attention, the "
        f"paragraphs dealt anew for each, and {BLOCK_PASSES} in both, {learns['flops']:.1e} operations. "
        f"On an H100 at an *assumed* {learns['assumed_share']:.0%} of {H100_FLOPS / 1e12:.0f} TFLOP/s: "
        f"{learns['seconds'] / 3600:.2f} hours of training, without compiling kernels, reading and the answers. "
        "What it would score nobody knows."
    )


def _provenance(result: dict[str, Any]) -> str:
    options, sources = result["options"], result["sources"]
    skipped = sum(stage["skipped"] for stage in result["training"])
    lines = [
        f"`{result['command']}`",
        f"{result['date']}, commit {(result['commit'] or 'unknown')[:12]}"
        f"{' with local changes' if result['modified'] else ''}; "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        f"{place(result)} of a machine with {result['machine']['cores']} cores"
        + (f"; {result['note']}" if result["note"] else ""),
        *(
            f"{name}: {source['name']}, {source['lines']:,} lines, SHA-256 {source['sha256']}"
            for name, source in sources.items()
        ),
        f"{options['gold']} paragraphs to a training line; {skipped:,} lines had questions left out for being longer "
        f"than {MAX_TOKENS:,} tokens",
        f"{options['held_out']:,} lines of {sources['dev']['name']} for the loss of answers; greedy answers of at most "
        f"{options['max_new_tokens']} tokens. Of a training that was stopped and continued no time is given",
    ]
    warned = [warning for model in STAGES for one in result["asked"][model].values() for warning in one["warnings"]]
    return "\n".join(f"- {line}" for line in [*lines, *dict.fromkeys(warned)])


def _tell(what: str) -> Callable[[str, int], None]:
    def tell(mode: str, done: int) -> None:
        _say(f"{what}, {mode}: {done:,} questions")

    return tell


def _say(message: str) -> None:
    print(f"{datetime.now(timezone.utc):%H:%M:%S} {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
