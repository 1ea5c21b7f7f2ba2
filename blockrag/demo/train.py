"""Train the demo checkpoint from scratch on made-up countries, on one CPU core.

    python -m blockrag.demo.train --out DIR --steps 7000 --seed 0

Two phases. First full attention, with a curriculum over the number of passages: it starts at two (one passage needs
no matching of names, so none is learned) and adds one whenever the running answer loss falls below 0.5. Then dual
block fine-tuning (arXiv 2409.15355, section 3.3): batches alternate between the block mask and full attention, so
that the checkpoint serves both. The loss is the answers' cross entropy plus half of the cross entropy of all tokens;
the latter is what makes copying emerge early. Many questions share the passages of a sequence, each an independent
last block, which is both cheaper and exactly the pattern of inference.

Half of the sequences leave random gaps between the positions of neighboring blocks, so that distances longer than the
sequences trained on are seen (a shift of the whole prompt would change nothing: rotary positions are relative).

With `--minutes` the schedule follows the clock once it is behind the steps; without it, runs are reproducible.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import functional

from blockrag.demo import forms, load_corpus, load_questions
from blockrag.demo.synthetic import Context, QuestionAnswer, RealFact, World

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

__all__ = ["Batch", "Recipe", "collate", "evaluate", "main", "real_contexts", "train"]

Attention = Literal["full", "block"]
PAD, BOS, EOS = 0, 1, 2
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Every number that shapes a training run.

    Args:
        steps: Optimizer steps of both phases together.
        seed: Seeds the weights and the data.
        vocabulary: Size of the byte-level BPE vocabulary.
        hidden, intermediate, layers, heads, kv_heads: Shape of the Llama model.
        learning_rate: Peak; linear warm-up over 40 steps, linear decay over the last `decay` of the run.
        decay: Share of the run in which the learning rate falls.
        block_phase: Share of the run after which block fine-tuning begins.
        max_passages: Most passages in a sequence.
        questions: Most questions about facts in a sequence.
        batch_tokens: Aim for so many tokens a step.
        lm_weight: Weight of the loss over all tokens.
        max_gap: Most positions left out in one sequence, over all its block borders.
    """

    steps: int = 7000
    seed: int = 0
    vocabulary: int = 768
    hidden: int = 192
    intermediate: int = 384
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    learning_rate: float = 2e-3
    decay: float = 0.4
    block_phase: float = 0.6
    max_passages: int = 8
    questions: int = 16
    batch_tokens: int = 2600
    lm_weight: float = 0.5
    max_gap: int = 500


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of packed questions, padded to one length.

    Args:
        ids: [batch, tokens] int64.
        positions: [batch, tokens] int64.
        mask: [batch, 1, tokens, tokens] bool, True where the row may attend to the column.
        answers: [batch, tokens] bool, True on the answers' tokens (with their EOS).
        spans: (row, start, stop, kind) of every answer.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    answers: torch.Tensor
    spans: tuple[tuple[int, int, int, str], ...]


def real_facts() -> list[RealFact]:
    """Return the facts of the demo corpus as the generator takes them."""
    titles = {passage.id: passage.title for passage in load_corpus()}
    return [
        RealFact(name=titles[row.passage_id], kind=row.kind, value=row.answer, held_out=row.held_out)
        for row in load_questions()
    ]


def train_tokenizer(facts: Sequence[RealFact], recipe: Recipe) -> Tokenizer:
    """Train the byte-level BPE tokenizer on train-split contexts; digits stay single tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    world = World(facts, split="train", seed=recipe.seed + 1000)
    texts = []
    for number in range(1500):
        context = world.context(passages=4, questions=6, simple=number % 4 == 0)
        texts += [forms.PREFIX] + [forms.passage_block(*passage) for passage in context.passages]
        texts += [forms.query_block(row.question) + forms.answer_text(row.answer) for row in context.questions]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def collate(
    contexts: Sequence[Context],
    tokenizer: Tokenizer,
    attention: Attention,
    *,
    gaps: random.Random | None = None,
    max_gap: int = 0,
) -> Batch:
    """Pack contexts into a batch: prefix block, passage blocks, then every question as its own last block.

    Args:
        contexts: One per row.
        tokenizer: Each block is tokenized on its own.
        attention: "block": a passage attends to itself only; "full": also to everything before it. A question
            attends to all passages and to itself in both.
        gaps: Draws the position gaps for half of the rows; None leaves none.
        max_gap: Most positions left out in one row.
    """
    rows = [_pack(context, tokenizer, gaps, max_gap) for context in contexts]
    length = max(len(row["ids"]) for row in rows)
    size = (len(rows), length)
    ids, positions = torch.full(size, PAD), torch.zeros(size, dtype=torch.long)
    blocks, is_query = torch.full(size, -1), torch.zeros(size, dtype=torch.bool)
    answers = torch.zeros(size, dtype=torch.bool)
    spans = []
    for number, row in enumerate(rows):
        count = len(row["ids"])
        ids[number, :count] = torch.tensor(row["ids"])
        positions[number, :count] = torch.tensor(row["positions"])
        blocks[number, :count] = torch.tensor(row["blocks"])
        is_query[number, row["context"] : count] = True
        for start, stop, kind in row["spans"]:
            answers[number, start:stop] = True
            spans.append((number, start, stop, kind))
    same = blocks[:, :, None] == blocks[:, None, :]
    real = blocks >= 0
    earlier = (real & ~is_query)[:, None, :] & (real if attention == "full" else is_query)[:, :, None]
    mask = (same | earlier) & torch.ones(length, length, dtype=torch.bool).tril()
    return Batch(ids=ids, positions=positions, mask=mask[:, None], answers=answers, spans=tuple(spans))


def _pack(context: Context, tokenizer: Tokenizer, gaps: random.Random | None, max_gap: int) -> dict[str, Any]:
    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    shared = [[BOS, *encode(forms.PREFIX)]] + [encode(forms.passage_block(*passage)) for passage in context.passages]
    steps = [0] * len(shared)
    if gaps is not None and gaps.random() < 0.5:
        share = gaps.randint(0, max_gap) // len(shared)
        steps = [gaps.randint(0, share) for _ in shared]
    ids: list[int] = []
    positions: list[int] = []
    blocks: list[int] = []
    spans = []
    position = 0
    for number, (tokens, step) in enumerate(zip(shared, steps, strict=True)):
        ids += tokens
        positions += range(position, position + len(tokens))
        blocks += [number] * len(tokens)
        position += len(tokens) + step
    end = len(ids)
    for number, row in enumerate(context.questions, start=len(shared)):
        asked, answer = encode(forms.query_block(row.question)), [*encode(forms.answer_text(row.answer)), EOS]
        spans.append((len(ids) + len(asked), len(ids) + len(asked) + len(answer), row.kind))
        ids += asked + answer
        positions += range(position, position + len(asked) + len(answer))
        blocks += [number] * (len(asked) + len(answer))
    return {"ids": ids, "positions": positions, "blocks": blocks, "context": end, "spans": spans}


def forward(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Return logits [batch, tokens, vocabulary]."""
    output = model(input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False)
    return output.logits


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, tokenizer: Tokenizer, contexts: Sequence[Context], attention: Attention
) -> dict[str, float]:
    """Return exact match in percent: "all", "fact", "order" and one entry for each kind of question.

    An answer counts when every one of its tokens and its EOS is the most likely one given those before it, which
    is the same as greedy decoding producing exactly the answer.
    """
    model.eval()
    hits: dict[str, list[bool]] = {}
    for start in range(0, len(contexts), 4):
        batch = collate(contexts[start : start + 4], tokenizer, attention)
        best = forward(model, batch).argmax(-1)
        for row, begin, stop, kind in batch.spans:
            hit = bool((best[row, begin - 1 : stop - 1] == batch.ids[row, begin:stop]).all())
            for group in ("all", "order" if kind in forms.ORDER_QUESTIONS else "fact", kind):
                hits.setdefault(group, []).append(hit)
    model.train()
    return {group: round(100 * sum(found) / len(found), 1) for group, found in sorted(hits.items())}


def real_contexts(*, held_out: bool | None, passages: int = 5, seed: int = 7, similar: bool = False) -> list[Context]:
    """Return one context for every passage of the demo corpus: that passage among others, and its questions.

    Args:
        held_out: Take the gold passages from held-out countries (True), from the others (False) or from all (None);
            the distractors come from the whole corpus.
        passages: Number of passages, the gold one among them at a random place.
        seed: Draws distractors and order.
        similar: Take as distractors the passages that share most words with the gold one, instead of random ones.
    """
    rng = random.Random(seed)
    corpus = load_corpus()
    words = {passage.id: set((passage.title + " " + passage.text).split()) for passage in corpus}
    asked: dict[str, list[QuestionAnswer]] = {}
    for row in load_questions(held_out):
        asked.setdefault(row.passage_id, []).append(QuestionAnswer(row.question, row.answer, row.kind))
    contexts = []
    for gold in corpus:
        if gold.id not in asked:
            continue
        others = [passage for passage in corpus if passage.id != gold.id]
        if similar:
            shared = {other.id: len(words[other.id] & words[gold.id]) / len(words[other.id]) for other in others}
            others = sorted(others, key=lambda other: (-shared[other.id], other.id))[: passages - 1]
        chosen = [gold, *rng.sample(others, passages - 1)]
        rng.shuffle(chosen)
        texts = tuple((passage.title, passage.text) for passage in chosen)
        contexts.append(Context(passages=texts, questions=tuple(asked[gold.id])))
    return contexts


def build_model(recipe: Recipe, vocabulary: int) -> LlamaForCausalLM:
    """Return the untrained model."""
    from transformers import LlamaConfig, LlamaForCausalLM

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
    return LlamaForCausalLM(config)


def learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    """Return the learning rate: warm-up over 40 steps, constant, then linear decay to 2 % of the peak."""
    warm = min(1.0, (step + 1) / 40)
    fall = min(1.0, max(0.02, (1 - progress) / recipe.decay))
    return recipe.learning_rate * min(warm, fall)


def train(recipe: Recipe, out: Path, *, minutes: float | None = None, report_every_s: float = 180) -> None:
    """Train and write the checkpoint folder, and `full_only/` beside it (the weights before block fine-tuning).

    Args:
        recipe: The numbers.
        out: Folder to write; made if absent. A usable checkpoint is written at every report.
        minutes: Latest end, on the wall clock.
        report_every_s: Seconds between two reports.
    """
    facts = real_facts()
    tokenizer = train_tokenizer(facts, recipe)
    model = build_model(recipe, tokenizer.get_vocab_size())
    parameters = sum(weight.numel() for weight in model.parameters())
    _LOG.info("%d parameters, %d tokens in the vocabulary", parameters, tokenizer.get_vocab_size())
    world = World(facts, split="train", seed=recipe.seed)
    rng = random.Random(recipe.seed)
    test_world = World(facts, split="test", seed=5)
    test = [test_world.context(passages=5, questions=6, order=1.0) for _ in range(24)]
    held = real_contexts(held_out=True)[::2]
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    log: dict[str, Any] = {"recipe": asdict(recipe), "parameters": parameters, "reports": [], "events": []}
    started, reported = time.monotonic(), 0.0
    average, passages, tokens, full_saved = 3.0, 2, 0, False
    for step in range(recipe.steps):
        elapsed = time.monotonic() - started
        progress = max(step / recipe.steps, elapsed / (minutes * 60) if minutes else 0.0)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, progress)
        if progress >= recipe.block_phase and not full_saved:
            full_saved = True
            log["events"].append({"step": step, "event": "block fine-tuning begins"})
            _save(out / "full_only", model, tokenizer, recipe, log, block_fine_tuned=False)
        attention: Attention = "block" if full_saved and step % 2 else "full"
        fewest = max(2, passages // 2) if passages < recipe.max_passages or rng.random() < 0.8 else 1
        count = rng.randint(fewest, passages)
        batch = _draw(world, tokenizer, recipe, attention, count, passages, rng)
        answer_loss, all_loss = _losses(forward(model, batch), batch)
        optimizer.zero_grad(set_to_none=True)
        (answer_loss + recipe.lm_weight * all_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens += batch.ids.numel()
        average = 0.95 * average + 0.05 * answer_loss.item()
        if average < 0.5 and passages < recipe.max_passages:
            passages, average = passages + 1, 0.8
            log["events"].append({"step": step, "event": f"up to {passages} passages"})
            _LOG.info("step %d, %.0f s: up to %d passages", step, elapsed, passages)
        if elapsed - reported > report_every_s:
            reported = elapsed
            report = {
                "step": step,
                "seconds": round(elapsed),
                "tokens": tokens,
                "answer_loss": round(average, 3),
                "lm_loss": round(all_loss.item(), 3),
                "passages": passages,
                "unseen_full": evaluate(model, tokenizer, test, "full"),
                "unseen_block": evaluate(model, tokenizer, test, "block")["all"],
                "held_out_full": evaluate(model, tokenizer, held, "full")["all"],
                "held_out_block": evaluate(model, tokenizer, held, "block")["all"],
            }
            log["reports"].append(report)
            _LOG.info("%s", json.dumps(report))
            _save(out, model, tokenizer, recipe, log, block_fine_tuned=full_saved)
    log["seconds"] = round(time.monotonic() - started)
    log["steps"] = step + 1
    log["tokens"] = tokens
    _save(out, model, tokenizer, recipe, log, block_fine_tuned=full_saved)


def _draw(
    world: World,
    tokenizer: Tokenizer,
    recipe: Recipe,
    attention: Attention,
    passages: int,
    limit: int,
    rng: random.Random,
) -> Batch:
    # Short words at first: what has to be learned is the look-up, and it is the same for all words.
    simple = rng.random() < (0.9 if limit <= 3 else 0.5 if limit <= 5 else 0.1)
    facts = (3, 4) if simple else (4, 6)
    rows, budget = [], recipe.batch_tokens * (2 + limit) // (2 + recipe.max_passages)
    while budget > 0:
        rows.append(world.context(passages=passages, facts=facts, questions=recipe.questions, simple=simple))
        budget -= passages * (12 if simple else 18) * sum(facts) // 2 + len(rows[-1].questions) * 21
    return collate(rows, tokenizer, attention, gaps=rng, max_gap=recipe.max_gap)


def _losses(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean loss over the answers' tokens and over all tokens."""
    losses = functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
    answers, every = batch.answers[:, 1:].flatten(), (batch.ids[:, 1:] != PAD).flatten()
    return losses[answers].mean(), losses[every].mean()


def _save(
    out: Path,
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    recipe: Recipe,
    log: dict[str, Any],
    *,
    block_fine_tuned: bool,
) -> None:
    """Write a Hugging Face folder, `block_attention.json` and `train_log.json`."""
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, max_new_tokens=32
    )
    model.save_pretrained(out)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    fast.save_pretrained(out)
    described = {
        "format": 1,
        "block_fine_tuned": block_fine_tuned,
        "max_blocks": recipe.max_passages + 2,
        "max_tokens": 1500,
        "template": {"prefix": forms.PREFIX, "passage": forms.PASSAGE_TEMPLATE, "query": forms.QUERY_TEMPLATE},
    }
    (out / "block_attention.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    (out / "train_log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Train the demo checkpoint; see `--help`."""
    defaults = Recipe()
    parser = argparse.ArgumentParser(description="Train blockrag's demo checkpoint on made-up countries.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--minutes", type=float, default=None)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER", help="other fields of Recipe")
    arguments = parser.parse_args(argv)
    from transformers.utils.logging import disable_progress_bar

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    disable_progress_bar()
    torch.set_num_threads(1)
    changes: dict[str, Any] = {"steps": arguments.steps, "seed": arguments.seed}
    for item in arguments.set:
        name, _, number = item.partition("=")
        changes[name] = type(getattr(defaults, name))(number)
    train(replace(defaults, **changes), arguments.out, minutes=arguments.minutes)


if __name__ == "__main__":
    main()
