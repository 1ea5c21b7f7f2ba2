"""Exact match without generating is what generating gives; the likelihood is what the composed path says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_finetune_exact import asked_of, inferred_logits
from tiny_models import CASES, tiny_model
from tiny_training import rag_line, samples_from

from blockrag.demo.contexts import real_contexts
from blockrag.errors import InputError
from blockrag.finetune.collate import spans_of
from blockrag.finetune.data.lines import Line
from blockrag.finetune.demo.lines import context_line
from blockrag.finetune.rows import Item
from blockrag.finetune.samples import Sample
from blockrag.finetune.scoring import Mode, Score, score
from blockrag.finetune.trainer import summarize
from blockrag.model.block_model import BlockModel
from blockrag.model.loading import load_pretrained
from blockrag.model.profile import structure_of
from blockrag.model.sampling import GenerationOptions

QUESTIONS = 30


@pytest.fixture(scope="module")
def demo() -> BlockModel:
    return BlockModel.from_pretrained("demo", dtype="float32", precision="float32", kept_bytes=0)


@pytest.fixture(scope="module")
def lines() -> list[Line]:
    """Questions about held-out countries, and about the order of the documents."""
    return [context_line(context) for context in real_contexts(held_out=True, order=True, passages=4)[:6]]


@pytest.fixture(scope="module")
def scored(demo: BlockModel, lines: list[Line], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Score]]:
    """Scores in a mode, question by question, of a model loaded as training loads it."""
    model, tokenizer, facts = load_pretrained("demo", device=torch.device("cpu"), dtype=torch.float32, revision=None)
    assert facts.template is not None
    samples = samples_from(tmp_path_factory.mktemp("demo"), lines, tokenizer, facts.template)
    found = {
        mode: [one for scores in score(model, structure_of(model), samples, mode, pad_id=0) for one in scores]
        for mode in ("full", "block", "block-no-reencode")
    }
    return found.__getitem__


def options_of(mode: Mode) -> dict[str, object]:
    return {"attention": "full" if mode == "full" else "block", "reencode": mode != "block-no-reencode"}


@pytest.mark.parametrize("mode", ["full", "block", "block-no-reencode"])
def test_right_is_what_greedy_decoding_writes(
    demo: BlockModel, lines: list[Line], scored: Callable[[Mode], list[Score]], mode: Mode
) -> None:
    asked = [one for line in lines for one in asked_of(line, demo.template, demo.tokenizer)]
    scores = scored(mode)
    assert len(scores) == len(asked) > QUESTIONS
    # The last ones of each line are about order, which without re-encoding is hard.
    chosen = range(len(asked) - QUESTIONS, len(asked))
    answers = demo.generate([asked[at][0] for at in chosen], GenerationOptions(max_new_tokens=24), **options_of(mode))
    for at, answer in zip(chosen, answers, strict=True):
        expected = demo.template.answer_block(demo.tokenizer, asked[at][1]).token_ids
        assert (answer.token_ids == expected) == scores[at].right, (asked[at][1], answer.text)


def test_both_outcomes_occur(scored: Callable[[Mode], list[Score]]) -> None:
    right = [one.right for mode in ("full", "block", "block-no-reencode") for one in scored(mode)]
    assert 0 < sum(right) < len(right)


@pytest.mark.parametrize("mode", ["full", "block", "block-no-reencode"])
def test_the_loss_is_the_composed_path_s(
    demo: BlockModel, lines: list[Line], scored: Callable[[Mode], list[Score]], mode: Mode
) -> None:
    asked = [one for line in lines for one in asked_of(line, demo.template, demo.tokenizer)]
    for at in (0, 3, len(asked) - 1):
        prompt, text = asked[at]
        answer = demo.template.answer_block(demo.tokenizer, text).token_ids
        logits = inferred_logits(demo, prompt, answer, **options_of(mode))
        loss = -logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)].sum()
        assert scored(mode)[at].loss == pytest.approx(float(loss), rel=1e-3, abs=1e-4)
        assert scored(mode)[at].num_tokens == len(answer)


def test_modes_differ(scored: Callable[[Mode], list[Score]]) -> None:
    totals = {mode: sum(one.loss for one in scored(mode)) for mode in ("full", "block", "block-no-reencode")}
    assert len({round(total, 2) for total in totals.values()}) == 3


def test_how_many_at_once_changes_nothing(tmp_path: Path, demo: BlockModel) -> None:
    model = tiny_model(CASES[0])
    lines: list[Line] = [rag_line(number, passages=number % 3, questions=1 + number % 3) for number in range(5)]
    samples: list[Sample] = samples_from(tmp_path, lines, demo.tokenizer)
    model.resize_token_embeddings(len(demo.tokenizer))
    one, three = (
        list(score(model, structure_of(model), samples, "block", pad_id=0, batch_rows=rows)) for rows in (1, 3)
    )
    assert [len(scores) for scores in three] == [len(sample.branches) for sample in samples]
    for before, after in zip(one, three, strict=True):
        assert [(single.kind, single.num_tokens, single.right) for single in before] == [
            (single.kind, single.num_tokens, single.right) for single in after
        ]
        assert [single.loss for single in after] == pytest.approx([single.loss for single in before], rel=1e-4)
    assert [single.kind for scores in one for single in scores] == [
        span.kind for span in spans_of([(Item(sample, "block"),) for sample in samples])
    ]


def test_scores_as_numbers() -> None:
    """Percent of questions, and the loss per token rather than per question."""
    scores = [Score("a", True, 1.0, 1), Score("a", False, 8.0, 2), Score("", True, 3.0, 3)]
    assert summarize(scores) == {
        "exact_match": pytest.approx(200 / 3),
        "loss": 2.0,
        "exact_match_a": 50.0,
    }
    assert summarize([]) == {}


def test_an_unknown_mode_is_refused() -> None:
    model = tiny_model(CASES[0])
    with pytest.raises(InputError, match="mode='banded' is none of"):
        next(score(model, structure_of(model), [], "banded", pad_id=0))
