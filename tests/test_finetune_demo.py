"""The demo model's recipe: its lines, and all three runs in small."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from statistics import median

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from blockrag.demo import checkpoint_path, forms
from blockrag.demo.contexts import real_contexts, real_facts
from blockrag.demo.untrained import Shape, save_untrained, train_tokenizer
from blockrag.finetune.data.lines import RagLine, line_to_json, parse_line
from blockrag.finetune.demo.lines import (
    BATCH_ROWS,
    CURRICULUM,
    MAX_PASSAGES,
    block_lines,
    curriculum_lines,
    unseen_lines,
)
from blockrag.finetune.demo.recipe import make
from blockrag.finetune.demo.release import release
from blockrag.finetune.demo.table import ROWS, table, tabulated
from blockrag.model.block_model import BlockModel
from blockrag.model.facts import load_facts

SENTENCES = re.compile(r"[^.]*(?:\.[^ ][^.]*)*\.(?: |$)")
TINY = Shape(hidden=32, intermediate=48, layers=2, heads=2, kv_heads=1, vocabulary=400)


@pytest.fixture(scope="module")
def lines() -> list[RagLine]:
    return list(block_lines(0, scale=0.12))


def test_the_seed_decides_the_lines() -> None:
    first = list(curriculum_lines(0, scale=0.001))
    assert first == list(curriculum_lines(0, scale=0.001))
    others = [list(curriculum_lines(1, scale=0.001)), list(block_lines(0, scale=0.005))]
    titles = [{one.passage.title for line in drawn for one in line.passages} for drawn in (first, *others)]
    assert first not in others
    assert len(titles[0] - titles[1]) > 10
    assert len(titles[0] - titles[2]) > 10
    assert unseen_lines("test", 3, 4, seed=5) == unseen_lines("test", 3, 4, seed=5)


def test_lines_are_what_the_readers_read(lines: list[RagLine]) -> None:
    for line in lines[:20]:
        assert parse_line(json.loads(json.dumps(line_to_json(line))), "here") == line


def test_passages_hold_four_to_eight_facts_mostly_in_60_to_120_tokens(lines: list[RagLine]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    passages = [one.passage for line in lines for one in line.passages]
    assert {len(SENTENCES.findall(one.text)) for one in passages} == {4, 5, 6, 7, 8}
    tokens = [len(tokenizer(forms.passage_block(one.title, one.text))["input_ids"]) for one in passages]
    assert 60 <= median(tokens) <= 120
    assert sum(60 <= count <= 120 for count in tokens) > 0.55 * len(tokens)
    assert all(50 <= count <= 250 for count in tokens)


def test_ten_to_fifteen_percent_are_about_order(lines: list[RagLine]) -> None:
    kinds = Counter(question.kind for line in lines for question in line.questions)
    assert set(kinds) == {"fact", "order"}
    assert 0.10 <= kinds["order"] / kinds.total() <= 0.15
    for line in lines:
        ends = {line.passages[0].passage.title, line.passages[-1].passage.title}
        assert {question.target for question in line.questions if question.kind == "order"} <= ends


def test_up_to_ten_passages_and_sometimes_one(lines: list[RagLine]) -> None:
    counts = Counter(len(line.passages) for line in lines)
    assert set(range(2, MAX_PASSAGES + 1)) <= set(counts) <= set(range(1, MAX_PASSAGES + 1))
    steps = [lines[at : at + BATCH_ROWS] for at in range(0, len(lines), BATCH_ROWS)]
    assert all(len({len(line.passages) for line in step}) == 1 for step in steps), "rows of a step are not padded"


def test_the_curriculum_begins_with_two_passages_of_simple_words_and_ends_with_up_to_ten() -> None:
    drawn = list(curriculum_lines(3, scale=0.02))
    at = 0
    for stage in CURRICULUM:
        rows = BATCH_ROWS * max(1, round(stage.steps * 0.02))
        part, at = drawn[at : at + rows], at + rows
        counts = {len(line.passages) for line in part}
        assert counts <= {*range(stage.fewest, stage.most + 1), *([1] if stage.fewest < stage.most else [])}
        titles = {one.passage.title for line in part for one in line.passages}
        assert all(len(title) <= 6 and " " not in title for title in titles) == stage.simple
    assert at == len(drawn)
    assert CURRICULUM[0].simple
    assert CURRICULUM[-1].most == MAX_PASSAGES


def test_tests_ask_about_words_training_never_holds(lines: list[RagLine]) -> None:
    trained = {one.passage.title for line in lines for one in line.passages}
    tested = {one.passage.title for line in unseen_lines("test", 5, 60, seed=5) for one in line.passages}
    assert len(tested) > 100
    assert trained.isdisjoint(tested)


@pytest.mark.parametrize("similar", [False, True])
def test_contexts_of_the_corpus(similar: bool) -> None:
    contexts = real_contexts(held_out=True, passages=5, similar=similar, order=True)
    held_out = {fact.name for fact in real_facts() if fact.held_out}
    assert len(contexts) == len(held_out)
    assert contexts == real_contexts(held_out=True, passages=5, similar=similar, order=True)
    for context in contexts:
        assert len({title for title, _ in context.passages}) == 5
        *facts, first, last = context.questions
        assert (first.answer, last.answer) == (context.passages[0][0], context.passages[-1][0])
        texts = [text for title, text in context.passages if title in held_out]
        assert all(any(one.answer in text for text in texts) for one in facts)
    assert similar == (_overlap(contexts) > _overlap(real_contexts(held_out=True, passages=5)) + 0.02)


def _overlap(contexts: list) -> float:
    """Words that the passages of a context share, on average."""
    shares = []
    for context in contexts:
        words = [set(text.split()) for _, text in context.passages]
        shares += [len(one & other) / len(one | other) for one in words for other in words if one is not other]
    return sum(shares) / len(shares)


def test_the_tokenizer_is_a_function_of_its_numbers() -> None:
    facts = real_facts()
    one, same, other = (train_tokenizer(facts, 400, contexts=40, seed=seed) for seed in (1, 1, 2))
    assert one.to_str() == same.to_str() != other.to_str()
    for number in (10, 47, 99, 4.7, 9.9):
        assert one.encode(str(number)).tokens == [str(number)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made")
    make(out, 0, shape=TINY, scale=0.0004)
    return out


def test_the_whole_recipe_in_small(made: Path) -> None:
    """An untrained model, full attention, and from there block fine-tuning and its control on the same lines."""
    logs = {stage: json.loads((made / stage / "train_log.json").read_text()) for stage in ("full", "block", "control")}
    assert {stage: (log["base"], log["settings"]["variants"]) for stage, log in logs.items()} == {
        "full": ("untrained", "full"),
        "block": ("full", "alternate"),
        "control": ("full", "full"),
    }
    assert logs["block"]["data"] == logs["control"]["data"] != logs["full"]["data"]
    assert logs["block"]["steps"] == logs["control"]["steps"] == 1
    assert logs["full"]["steps"] == len(CURRICULUM)
    for log in logs.values():
        (evaluated,) = [entry for entry in log["history"] if "eval_full_loss" in entry]
        assert {"eval_full_exact_match_order", "eval_block_exact_match_fact"} <= evaluated.keys()
    stages = [load_file(made / stage / "model.safetensors") for stage in ("untrained", "full", "block", "control")]
    for one, other in ((0, 1), (1, 2), (1, 3), (2, 3)):
        assert any(not torch.equal(stages[one][name], stages[other][name]) for name in stages[0])
    facts = [load_facts(made / stage / "block_attention.json") for stage in ("untrained", "full", "control", "block")]
    assert [one.block_fine_tuned for one in facts] == [False, False, False, True]
    assert facts[-1].max_blocks == 1 + max(map(len, (line.passages for line in list(block_lines(0, scale=0.0004)))))
    assert not list(made.rglob("checkpoints"))


def test_what_was_made_answers_in_block_attention(made: Path) -> None:
    model = BlockModel.from_pretrained(made / "block")
    (line,) = unseen_lines("test", 2, 1, seed=5)
    prompt = model.template.segment(
        model.tokenizer, passages=[one.passage for one in line.passages], question=line.questions[0].question
    )
    assert model.generate(prompt).usage.new_tokens > 0


def test_what_is_there_is_kept(made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()}
    make(made, 0, shape=TINY, scale=0.0004)
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.is_file()} == before


def test_untrained_weights_are_a_function_of_the_seed(made: Path, tmp_path: Path) -> None:
    for name, seed in (("same", 0), ("other", 1)):
        save_untrained(tmp_path / name, real_facts(), TINY, seed=seed)
    read = [
        (path / "model.safetensors").read_bytes()
        for path in (made / "untrained", tmp_path / "same", tmp_path / "other")
    ]
    assert read[0] == read[1] != read[2]
    tokenizers = {(path / "tokenizer.json").read_text() for path in (made / "untrained", tmp_path / "other")}
    assert len(tokenizers) == 1


def test_a_cell_is_the_mean_over_seeds_and_differences_are_taken_question_by_question() -> None:
    """Two seeds, two lines; the reference row is right once more than the others."""
    half = [[["fact", True], ["fact", False], ["order", True]], [["fact", False], ["fact", False], ["order", False]]]
    better = [[["fact", True], ["fact", True], ["order", True]], [["fact", False], ["fact", False], ["order", False]]]
    results = {f"{model} {mode}": [half, half] for _, model, mode in ROWS}
    results["block full"] = [better, half]
    cells = tabulated(results, "fact")
    assert [cell.value.value for cell in cells] == [37.5 if row == 4 else 25.0 for row in range(len(ROWS))]
    assert cells[4].per_seed == (50.0, 25.0)
    assert cells[0].difference.value == -12.5
    assert cells[0].difference.clusters == 2
    assert cells[4].difference.value == cells[4].difference.se == 0.0
    assert {cell.value.value for cell in tabulated(results, "order")} == {50.0}


def test_the_table_and_the_release(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for seed in (0, 1):
        shutil.copytree(made, out / f"seed-{seed}")
    sets = {"a few": lambda: unseen_lines("test", 2, 3, seed=5)}
    found = table(out, [0, 1], sets)
    assert len(found.splitlines()) == 2 + len(ROWS)
    assert "a few: exact match" in found
    assert found == table(out, [0, 1], sets), "what was measured is kept"
    assert len(json.loads((out / "results.json").read_text())) == 2 * len(ROWS)
    release(out, 1, tmp_path / "shipped", "the command", found)
    card = (tmp_path / "shipped" / "README.md").read_text()
    assert found in card
    assert "the command" in card
    assert not re.search(r"[{}]", card.replace("{title}", ""))
    weights = load_file(tmp_path / "shipped" / "model.safetensors")
    trained = load_file(out / "seed-1" / "block" / "model.safetensors")
    assert all(torch.equal(weights[name], weight.bfloat16()) for name, weight in trained.items())
    assert BlockModel.from_pretrained(tmp_path / "shipped").facts == BlockModel.from_pretrained(made / "block").facts
