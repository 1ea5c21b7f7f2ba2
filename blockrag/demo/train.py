"""Train the demo checkpoint from scratch on made-up countries, on one CPU core, and measure it.

    python -m blockrag.demo.train --out DIR --steps 6000 --seed 0
    python -m blockrag.demo.train --measure DIR

Two phases. First full attention, with a curriculum over the number of passages: it starts at two (one passage needs
no matching of names, so none is learned) and adds one whenever the running answer loss falls below 0.5. Then dual
block fine-tuning (arXiv 2409.15355): batches alternate between the block mask and full attention, so
that the checkpoint serves both. The loss is the answers' cross entropy plus half of the cross entropy of all tokens;
the latter is what makes copying emerge early. Values must differ in shape by kind of fact (numbers, "Mount ...",
".xx"): then the right kind is found first, and the name is minded next; with uniform made-up words neither is learned.

Half of the sequences leave positions out between neighboring blocks, so that distances longer than the sequences
trained on are seen (shifting a whole prompt would change nothing: rotary positions are relative).

With `--minutes` the schedule follows the clock where it is behind the steps; without, a run is reproducible.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from blockrag.demo import forms, load_corpus, load_questions
from blockrag.demo.packing import BOS, EOS, PAD, Attention, Batch, collate, exact_match, forward
from blockrag.demo.synthetic import Context, QuestionAnswer, RealFact, World

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

__all__ = ["Recipe", "main", "measure", "real_contexts", "real_facts", "train"]

# The pieces of GPT-2's tokenizer, but with numbers cut to two digits.
_PIECES = r"""\d\.\d(?!\d)|\d{1,2}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Every number that shapes a training run.

    Args:
        steps: Optimizer steps of both phases together.
        seed: Seeds the weights and the data.
        vocabulary: Size of the byte-level BPE vocabulary, before the short numbers are added.
        tokenizer_contexts: Number of contexts to train the tokenizer on.
        hidden: Width of the Llama model.
        intermediate: Width of its MLPs.
        layers: Number of its layers.
        heads: Query heads.
        kv_heads: Key/value heads.
        learning_rate: Peak; linear warm-up over 40 steps, linear decay over the last `decay` of the run.
        decay: Share of the run in which the learning rate falls.
        block_phase: Share of the run after which block fine-tuning begins.
        min_passages: Most passages in a sequence at the start of the curriculum.
        max_passages: Most passages in a sequence at its end.
        questions: Most questions about facts in a sequence.
        batch_tokens: About so many tokens a step once all passages are in use; fewer before.
        lm_weight: Weight of the loss over all tokens.
        max_gap: Most positions left out in one sequence, over all its block borders.
    """

    steps: int = 6000
    seed: int = 0
    vocabulary: int = 768
    tokenizer_contexts: int = 1500
    hidden: int = 192
    intermediate: int = 384
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    learning_rate: float = 2e-3
    decay: float = 0.4
    block_phase: float = 0.55
    min_passages: int = 2
    max_passages: int = 8
    questions: int = 16
    batch_tokens: int = 2400
    lm_weight: float = 0.5
    max_gap: int = 500


@dataclass(slots=True)
class _Run:
    """What changes while training."""

    model: LlamaForCausalLM
    tokenizer: Tokenizer
    passages: int
    answer_loss: float = 3.0
    lm_loss: float = 0.0
    tokens: int = 0
    longest: int = 0
    block_fine_tuned: bool = False
    log: dict[str, Any] = field(default_factory=dict)


def real_facts() -> list[RealFact]:
    """Return the facts of the demo corpus as the generator takes them."""
    titles = {passage.id: passage.title for passage in load_corpus()}
    return [
        RealFact(name=titles[row.passage_id], kind=row.kind, value=row.answer, held_out=row.held_out)
        for row in load_questions()
    ]


def real_contexts(
    *, held_out: bool | None, passages: int = 5, seed: int = 7, similar: bool = False, order: bool = False
) -> list[Context]:
    """Return one context for each passage of the demo corpus: that passage among others, and the questions about it.

    Args:
        held_out: Ask about held-out countries (True), about the others (False) or about all (None); the other
            passages of a context come from the whole corpus.
        passages: Number of passages, the one asked about among them at a random place.
        seed: Draws the other passages and the order.
        similar: Take the passages that share most words with the one asked about, instead of random ones.
        order: Also ask which place the first and the last document describe.
    """
    rng = random.Random(seed)
    corpus = load_corpus()
    words = {passage.id: set(f"{passage.title} {passage.text}".split()) for passage in corpus}
    asked: dict[str, list[QuestionAnswer]] = {}
    for row in load_questions(held_out):
        asked.setdefault(row.passage_id, []).append(QuestionAnswer(row.question, row.answer, row.kind))
    contexts = []
    for gold in (passage for passage in corpus if passage.id in asked):
        others = [passage for passage in corpus if passage.id != gold.id]
        if similar:
            alike = {other.id: len(words[other.id] & words[gold.id]) / len(words[other.id]) for other in others}
            others = sorted(others, key=lambda other: (-alike[other.id], other.id))[: passages - 1]
        chosen = [gold, *rng.sample(others, passages - 1)]
        rng.shuffle(chosen)
        ends = (("first", chosen[0].title), ("last", chosen[-1].title)) if order else ()
        questions = asked[gold.id] + [
            QuestionAnswer(forms.ORDER_QUESTIONS[which], title, which) for which, title in ends
        ]
        texts = tuple((passage.title, passage.text) for passage in chosen)
        contexts.append(Context(passages=texts, questions=tuple(questions)))
    return contexts


def train_tokenizer(facts: Sequence[RealFact], recipe: Recipe) -> Tokenizer:
    """Train the byte-level BPE tokenizer on made-up countries of the train split, and add the short numbers."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    world = World(facts, split="train", seed=recipe.seed + 1000)
    texts = []
    for _ in range(recipe.tokenizer_contexts):
        context = world.context(passages=4, questions=6)
        texts += [forms.PREFIX] + [forms.passage_block(*passage) for passage in context.passages]
        texts += [forms.query_block(row.question) + forms.answer_text(row.answer) for row in context.questions]
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_numbers(tokenizer)


def _with_numbers(tokenizer: Tokenizer) -> Tokenizer:
    """Make one token of every number of two digits ("47", "4.7").

    Copying a number digit by digit is far harder to learn than copying a word: digits repeat all over the passages.
    """
    from tokenizers import Tokenizer

    described = json.loads(tokenizer.to_str())
    vocabulary, merges = described["model"]["vocab"], described["model"]["merges"]
    known = {tuple(merge) for merge in merges}
    pairs = [(first, second) for first in "123456789" for second in "0123456789"]
    pairs += [(first, ".") for first in "123456789"]
    pairs += [(f"{first}.", second) for first in "123456789" for second in "123456789"]
    for pair in pairs:
        if pair not in known:
            vocabulary.setdefault("".join(pair), len(vocabulary))
            merges.append(list(pair))
    return Tokenizer.from_str(json.dumps(described))


def build_model(recipe: Recipe, vocabulary: int) -> LlamaForCausalLM:
    """Return the untrained model."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, max_new_tokens=32
    )
    return model


def train(
    recipe: Recipe,
    out: Path,
    *,
    start: Path | None = None,
    minutes: float | None = None,
    report_every_s: float = 180,
) -> None:
    """Train, and write the checkpoint folder, with the weights before block fine-tuning in its folder `full_only`.

    Args:
        recipe: The numbers.
        out: Folder to write; made if absent. Every report leaves a usable checkpoint there.
        start: Checkpoint folder whose weights and tokenizer to start from, instead of from scratch.
        minutes: Latest end, by the wall clock.
        report_every_s: Seconds between two reports.
    """
    facts = real_facts()
    tokenizer = train_tokenizer(facts, recipe) if start is None else _load_tokenizer(start)
    run = _Run(build_model(recipe, tokenizer.get_vocab_size()), tokenizer, recipe.min_passages)
    if start is not None:
        run.model.load_state_dict(type(run.model).from_pretrained(start).state_dict())
    parameters = sum(weight.numel() for weight in run.model.parameters())
    run.log = {"recipe": asdict(recipe), "minutes": minutes, "started_from_weights": start is not None}
    run.log |= {"parameters": parameters, "vocabulary": tokenizer.get_vocab_size(), "events": [], "reports": []}
    _LOG.info("%d parameters, %d tokens in the vocabulary", parameters, tokenizer.get_vocab_size())
    world, rng = World(facts, split="train", seed=recipe.seed), random.Random(recipe.seed)
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    started, reported, taken = time.monotonic(), 0.0, 0
    for step in range(recipe.steps):
        elapsed = time.monotonic() - started
        progress = max(step / recipe.steps, elapsed / (minutes * 60) if minutes else 0.0)
        if progress >= 1:
            break
        if progress >= recipe.block_phase and not run.block_fine_tuned:
            _note(run, step, "block fine-tuning begins")
            _save(out / "full_only", run, recipe)
            run.block_fine_tuned = True
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(recipe, step, progress)
        _step(run, world, recipe, optimizer, rng, "block" if run.block_fine_tuned and step % 2 else "full")
        taken = step + 1
        if run.answer_loss < 0.5 and run.passages < recipe.max_passages:
            run.passages, run.answer_loss = run.passages + 1, 0.8
            _note(run, step, f"up to {run.passages} passages")
        if step % 100 == 0:
            _LOG.info(
                "step %d, %.0f s: answer loss %.3f, loss of all tokens %.3f",
                step,
                elapsed,
                run.answer_loss,
                run.lm_loss,
            )
        if elapsed - reported > report_every_s:
            reported = elapsed
            _report(run, facts, step, elapsed)
            _save(out, run, recipe)
    run.log |= {"steps": taken, "tokens": run.tokens, "seconds": round(time.monotonic() - started)}
    _save(out, run, recipe)


def _load_tokenizer(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    fall = min(1.0, max(0.02, (1 - progress) / recipe.decay))
    return recipe.learning_rate * min(1.0, (step + 1) / 40, fall)


def _step(
    run: _Run, world: World, recipe: Recipe, optimizer: torch.optim.Optimizer, rng: random.Random, attention: Attention
) -> None:
    fewest = max(2, run.passages // 2) if run.passages < recipe.max_passages or rng.random() < 0.8 else 1
    batch = _draw(run, world, recipe, attention, rng.randint(fewest, run.passages), rng)
    answer_loss, lm_loss = _losses(forward(run.model, batch), batch)
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(answer_loss + recipe.lm_weight * lm_loss)
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    optimizer.step()
    run.tokens += batch.ids.numel()
    run.longest = max(run.longest, int(batch.positions.max()) + 1)
    run.answer_loss = 0.95 * run.answer_loss + 0.05 * answer_loss.item()
    run.lm_loss = lm_loss.item()


def _draw(run: _Run, world: World, recipe: Recipe, attention: Attention, passages: int, rng: random.Random) -> Batch:
    facts = (3, 4) if run.passages <= 3 else (4, 6)
    rows, budget = [], recipe.batch_tokens * (2 + run.passages) // (2 + recipe.max_passages)
    while budget > 0:
        rows.append(world.context(passages=passages, facts=facts, questions=recipe.questions))
        budget -= passages * 18 * sum(facts) // 2 + len(rows[-1].questions) * 21
    return collate(rows, run.tokenizer, attention, gaps=rng, max_gap=recipe.max_gap)


def _losses(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean loss over the answers' tokens and over all tokens."""
    losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
    answers, every = batch.answers[:, 1:].flatten(), (batch.ids[:, 1:] != PAD).flatten()
    return losses[answers].mean(), losses[every].mean()


def _note(run: _Run, step: int, event: str) -> None:
    _LOG.info("step %d: %s", step, event)
    run.log["events"].append({"step": step, "event": event})


def _report(run: _Run, facts: Sequence[RealFact], step: int, elapsed: float) -> None:
    unseen, held_out = _unseen_contexts(facts, 24), real_contexts(held_out=True)[::2]
    report: dict[str, Any] = {
        "step": step,
        "seconds": round(elapsed),
        "tokens": run.tokens,
        "answer_loss": round(run.answer_loss, 3),
        "lm_loss": round(run.lm_loss, 3),
        "passages": run.passages,
    }
    for attention in ("full", "block"):
        report[f"unseen_{attention}"] = _percent(exact_match(run.model, run.tokenizer, unseen, attention)["all"])
        report[f"held_out_{attention}"] = _percent(exact_match(run.model, run.tokenizer, held_out, attention)["all"])
    run.log["reports"].append(report)
    _LOG.info("%s", json.dumps(report))


def _unseen_contexts(facts: Sequence[RealFact], count: int, passages: int = 5) -> list[Context]:
    world = World(facts, split="test", seed=5)
    return [world.context(passages=passages, questions=6, order=1.0) for _ in range(count)]


def _percent(counts: tuple[int, int]) -> float:
    return round(100 * counts[0] / counts[1], 1)


def _save(out: Path, run: _Run, recipe: Recipe) -> None:
    """Write a Hugging Face folder with `block_attention.json` and `train_log.json`."""
    from transformers import PreTrainedTokenizerFast

    from blockrag.model.facts import BlockAttentionFacts, save_facts

    out.mkdir(parents=True, exist_ok=True)
    run.model.save_pretrained(out)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=run.tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    fast.save_pretrained(out)
    described = BlockAttentionFacts(
        block_fine_tuned=run.block_fine_tuned,
        template=forms.template(),
        max_blocks=recipe.max_passages + 1,
        max_tokens=max(1, run.longest),
    )
    save_facts(described, out)
    (out / "train_log.json").write_text(json.dumps(run.log, indent=1) + "\n", encoding="utf-8")


def measure(folder: Path) -> dict[str, dict[str, str]]:
    """Measure a checkpoint; add the table to its `train_log.json` and write its model card.

    Returns:
        Row name ("held-out countries, 5 random passages", ...) to column ("full facts", "block order", ...) to
        "percent (questions)".
    """
    table = {}
    facts = real_facts()
    rows = {
        "made-up countries of the test split, 5 passages": _unseen_contexts(facts, 120),
        "made-up countries of the test split, 8 passages": _unseen_contexts(facts, 60, 8),
        "held-out countries, 5 passages": real_contexts(held_out=True, order=True),
        "held-out countries, 5 similar passages": real_contexts(held_out=True, similar=True, order=True),
        "held-out countries, 8 passages": real_contexts(held_out=True, passages=8, order=True),
        "all countries, 5 passages": real_contexts(held_out=None, order=True),
    }
    for name, contexts in rows.items():
        table[name] = _measured_row(folder, contexts)
        _LOG.info("%s: %s", name, table[name])
    log = json.loads((folder / "train_log.json").read_text(encoding="utf-8"))
    log["results"] = table
    (folder / "train_log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(log), encoding="utf-8")
    return table


def _measured_row(folder: Path, contexts: Sequence[Context]) -> dict[str, str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    row = {}
    before = folder / "full_only"
    stages = {"": folder} | ({"before block fine-tuning, ": before} if before.is_dir() else {})
    for stage, path in stages.items():
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        tokenizer = AutoTokenizer.from_pretrained(path).backend_tokenizer
        for attention in ("full", "block"):
            counts = exact_match(model, tokenizer, contexts, attention)
            for group in ("fact", "order"):
                row[f"{stage}{attention}, {group}"] = f"{_percent(counts[group])} ({counts[group][1]})"
    return row


def _card(log: Mapping[str, Any]) -> str:
    """Return the model card."""
    table = log["results"]
    columns = list(next(iter(table.values())))
    lines = ["| exact match, % (questions) | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(row[column] for column in columns) + " |" for name, row in table.items()]
    recipe = log["recipe"]
    defaults = asdict(Recipe())
    changed = [f"{name}={recipe[name]}" for name in defaults if recipe[name] != defaults[name]]
    options = [name for name in changed if not name.startswith(("steps=", "seed="))]
    return _CARD.format(
        **recipe,
        parameters=log["parameters"],
        table="\n".join(lines),
        all_tokens=log["vocabulary"],
        taken=log["steps"],
        tokens=log["tokens"],
        minutes=round(log["seconds"] / 60),
        options="".join(f" {text}" for text in (["--set", *options] if options else [])),
        limit=f" --minutes {log['minutes']:g}" if log["minutes"] else "",
        start=log.get("start", ""),
        events="\n".join(f"- step {event['step']}: {event['event']}" for event in log["events"]),
    )


_CARD = """\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
tags: [block-attention, rag, demo]
---
# blockrag demo checkpoint

A Llama with {parameters:,} parameters ({layers} layers, width {hidden}, {heads} query and {kv_heads} key/value heads,
byte-level BPE with {all_tokens} tokens), trained from scratch to answer questions about short passages and fine-tuned
for Block-Attention (arXiv 2409.15355). It exists so that blockrag's first command, its examples and its tests run a
complete pipeline offline. It is no general language model.

## What it can do
Answer the question forms in `blockrag/demo/forms.py` (capital, region, population, area, language, currency, highest
point, internet code, a neighbor; which document comes first or last), in that exact wording, from passages written in
the sentence forms of the same file. Anything else gives nonsense, and it never says that it does not know. At most
{max_passages} passages were seen in training; ask it about no more. Decode greedily.

## Data
Only generated text (`blockrag/demo/synthetic.py`): made-up countries with made-up values, to which names and values of
real countries that are not held out were mixed in at random, so the statements are false on purpose. 60 real
countries are held out: neither their names, nor values that only they have, occur in the training data. The generator's
"test" words are disjoint from its "train" words. The held-out countries never entered training, but mistakes on them
were looked at while the recipe was developed (they led to the short form of numbers).

## Recipe
`python -m blockrag.demo.train --out DIR --steps {steps} --seed {seed}{limit}{options}` on one CPU core:
{taken} steps, {tokens:,} tokens, {minutes} minutes. Full attention first, with a growing number of passages; then
batches alternate between block and full attention. `train_log.json` holds every number.
{start}

{events}

## Measured
Greedy exact match of the whole answer; one seed. "before block fine-tuning" is the same run at the end of its first
phase (fewer steps, so the comparison mixes both effects). "similar passages" are those of the corpus that share most
words with the one asked about. "order" questions can only be answered from the order of the documents.

{table}

Command: `python -m blockrag.demo.train --measure DIR`.
"""


def main(argv: list[str] | None = None) -> None:
    """Train or measure the demo checkpoint; see `--help`."""
    from transformers.utils.logging import disable_progress_bar

    defaults = Recipe()
    parser = argparse.ArgumentParser(description="Train blockrag's demo checkpoint on made-up countries.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, help="train, and write the checkpoint here")
    action.add_argument("--measure", type=Path, help="measure the checkpoint in this folder and write its model card")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--minutes", type=float, default=None, help="end by then, whatever the steps")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--start", type=Path, default=None, help="start from the checkpoint in this folder")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="other fields of Recipe")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    disable_progress_bar()
    torch.set_num_threads(1)
    if arguments.measure:
        measure(arguments.measure)
        return
    changes: dict[str, Any] = {"steps": arguments.steps, "seed": arguments.seed}
    for item in arguments.set:
        name, _, number = item.partition("=")
        changes[name] = type(getattr(defaults, name))(number)
    train(replace(defaults, **changes), arguments.out, start=arguments.start, minutes=arguments.minutes)


if __name__ == "__main__":
    main()
