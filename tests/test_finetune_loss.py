"""The loss of packed rows is that of their parts; so are the gradients, and so are the steps, however they are cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_finetune_exact import PREFIXED_PLAIN
from tiny_models import CASES, tiny_model
from tiny_tokenizers import plain_tokenizer
from tiny_training import rag_line, samples_from

from blockrag.finetune.collate import IGNORED, collate, layout_of, spans_of
from blockrag.finetune.loss import denominator, labelled_columns, summed_loss
from blockrag.finetune.rows import Item, Row, Rows
from blockrag.model.masks import mask_argument
from blockrag.model.profile import structure_of


@pytest.fixture(scope="module")
def model() -> object:
    return tiny_model(CASES[0])


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    """Five samples in both attentions in turn, with one to three questions each, and gaps in some."""
    lines = [rag_line(number, passages=number % 4, questions=1 + number % 3) for number in range(5)]
    samples = samples_from(tmp_path_factory.mktemp("lines"), lines, plain_tokenizer(), PREFIXED_PLAIN)
    return [item for row in Rows(samples, variants="alternate", order="file", max_gap=30, seed=1) for item in row]


def loss_of(model: object, rows: Sequence[Row], prompt_weight: float = 0.0) -> torch.Tensor:
    batch = collate(rows, pad_id=0, prompt_weight=prompt_weight)
    columns = labelled_columns(batch["labels"])
    logits = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=mask_argument(model, structure_of(model), layout_of(batch)),
        logits_to_keep=columns,
        use_cache=False,
    ).logits
    return summed_loss(logits, batch["labels"], batch["weights"], columns)


def gradients(model: object, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([one.flatten() for one in torch.autograd.grad(loss, list(model.parameters()))])


def alone(items: Sequence[Item]) -> list[Row]:
    """Every question in a row of its own, with all its passages: what packing saves."""
    return [
        (replace(item, sample=replace(item.sample, branches=(branch,))),)
        for item in items
        for branch in item.sample.branches
    ]


def shared_alone(items: Sequence[Item]) -> list[tuple[Row, int]]:
    """The blocks of every sample without a question, and how often `alone` repeats them."""
    return [
        ((replace(item, sample=replace(item.sample, branches=())),), len(item.sample.branches))
        for item in items
        if item.sample.blocks
    ]


def test_answers_packed_and_alone(model: object, items: list[Item]) -> None:
    """Everything in one row, in two padded rows, and every question in a forward of its own: the same tokens."""
    expected = sum(loss_of(model, [row]) for row in alone(items))
    wanted = gradients(model, expected)
    for rows in ([tuple(items)], [tuple(items[:2]), tuple(items[2:])], [(item,) for item in items], alone(items)):
        packed = loss_of(model, rows)
        assert packed.item() == pytest.approx(expected.item(), rel=1e-6)
        assert (gradients(model, packed) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert expected.item() > 1


def test_prompts_packed_and_alone(model: object, items: list[Item]) -> None:
    """Packed, the shared blocks count once; alone, once for every question: the difference is what they lose."""
    weight = 0.25
    expected = sum(loss_of(model, [row], weight) for row in alone(items))
    for row, times in shared_alone(items):
        if times > 1:
            expected = expected - (times - 1) * loss_of(model, [row], weight)
    packed = loss_of(model, [tuple(items)], weight)
    assert packed.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted = gradients(model, expected)
    assert (gradients(model, packed) - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    assert packed.item() > loss_of(model, [tuple(items)]).item() * 1.1


def test_what_counts_and_how_much(items: list[Item]) -> None:
    """Answers count 1, prompts their weight, the first token of each block, padding and gaps nothing."""
    rows = [tuple(items[1:3]), (items[0],)]
    batch = collate(rows, pad_id=0, prompt_weight=0.25, multiple=64)
    assert batch["input_ids"].shape[1] % 64 == 0
    for number, row in enumerate(rows):
        expected: list[float] = []
        ids: list[int] = []
        for item in row:
            for block in item.sample.blocks:
                expected += [0.0] + [0.25] * (len(block) - 1)
                ids += list(block)
            for branch in item.sample.branches:
                expected += [0.0] + [0.25] * (len(branch.query) - 1) + [1.0] * len(branch.answer)
                ids += [*branch.query, *branch.answer]
        padding = batch["input_ids"].shape[1] - len(ids)
        assert batch["weights"][number].tolist() == expected + [0.0] * padding
        labels = [token if weight else IGNORED for token, weight in zip(ids, expected, strict=True)]
        assert batch["labels"][number].tolist() == labels + [IGNORED] * padding
        assert batch["input_ids"][number].tolist() == ids + [0] * padding
        assert int(batch["num_answers"][number]) == sum(len(item.sample.branches) for item in row)
    plain = collate(rows, pad_id=0)
    assert int((plain["labels"] != IGNORED).sum()) == sum(
        len(branch.answer) for row in rows for item in row for branch in item.sample.branches
    )
    spans = spans_of(rows)
    answers = [branch.answer.tolist() for row in rows for item in row for branch in item.sample.branches]
    assert [plain["input_ids"][span.row, span.start : span.end].tolist() for span in spans] == answers


def test_denominators(items: list[Item]) -> None:
    """Over all micro-batches: the weight of what counts, or the number of answers."""
    batches = [collate([(item,)], pad_id=0, prompt_weight=0.25) for item in items]
    answers = sum(len(item.sample.branches) for item in items)
    assert float(denominator(batches, "sum")) == answers
    assert float(denominator(batches, "mean")) == sum(float(batch["weights"].sum()) for batch in batches)
    assert denominator(batches, "mean").dtype == torch.float64


def test_columns_are_those_before_a_label() -> None:
    labels = torch.tensor([[IGNORED, IGNORED, 5, 6, IGNORED], [IGNORED, 7, IGNORED, 8, IGNORED]])
    assert labelled_columns(labels).tolist() == [0, 1, 2]


def test_the_loss_is_cross_entropy_by_hand() -> None:
    logits = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[IGNORED, 3, IGNORED], [IGNORED, 1, 2]])
    weights = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.5, 1.0]])
    chances = logits.log_softmax(-1)
    by_hand = -(chances[0, 0, 3] + 0.5 * chances[1, 0, 1] + chances[1, 1, 2])
    assert float(summed_loss(logits, labels, weights, torch.tensor([0, 1]))) == pytest.approx(by_hand.item(), rel=1e-6)


def test_the_order_of_questions_changes_nothing(model: object, tmp_path: Path) -> None:
    """Every question stands where the passages end, whatever stands between."""
    (sample,) = samples_from(tmp_path, [rag_line(1, questions=3)], plain_tokenizer(), PREFIXED_PLAIN)
    first, second, third = sample.branches
    changed = replace(sample, branches=(first, third, second))
    row, other = ((Item(sample, "block"),), (Item(changed, "block"),))
    assert loss_of(model, [row]).item() == pytest.approx(loss_of(model, [other]).item(), rel=1e-6)
