"""Drift: nothing where nothing changes, what changed where something does, and the model left as it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from benchmark_scripts import benchmark_script
from test_exactness import prompt_of

from blockrag.codec import payload_nbytes
from blockrag.demo import load_questions
from blockrag.errors import InputError
from blockrag.evaluation.drift import SMALL_MODEL_WARNING, Drift, measure_drift
from blockrag.model.facts import BlockAttentionFacts
from blockrag.model.sampling import GenerationOptions

PROMPTS = [prompt_of((12, 20, 9), 5, seed=seed) for seed in range(6)]
PRECISIONS = ("float32", "float16", "int8", "int4")


@pytest.fixture(scope="module")
def drift() -> Drift:
    from shared_models import FINE_TUNED, shared_model
    from tiny_tokenizers import plain_tokenizer

    from blockrag.model.block_model import BlockModel

    model = BlockModel(shared_model("llama"), plain_tokenizer(), facts=FINE_TUNED, precision="float16")
    return measure_drift(model, PROMPTS, PRECISIONS, max_new_tokens=8)


def test_float32_changes_nothing(drift: Drift) -> None:
    exact = drift.precisions[0]
    assert exact.precision == "float32"
    assert exact.changed == ()
    assert drift.unchanged(exact) == 1
    assert exact.answer_kl_max == exact.first_token_kl_max == 0


def test_fewer_bits_diverge_more(drift: Drift) -> None:
    _, float16, int8, int4 = drift.precisions
    assert 0 < float16.answer_kl_mean < int8.answer_kl_mean < int4.answer_kl_mean
    for one in (float16, int8, int4):
        assert one.first_token_kl_mean <= one.first_token_kl_max <= one.answer_kl_max
    # Random weights leave many tokens nearly equally likely.
    assert int4.changed
    assert drift.unchanged(int4) < 1


def test_changed_answers_are_those_that_generating_gives(drift: Drift, make_model) -> None:
    options = GenerationOptions(max_new_tokens=8)
    for one in drift.precisions:
        texts = [make_model(precision=one.precision).generate(prompt, options).text for prompt in PROMPTS]
        changed = [(i, drift.reference[i], text) for i, text in enumerate(texts) if text != drift.reference[i]]
        assert [(c.index, c.reference, c.answer) for c in one.changed] == changed


def test_divergences_are_those_of_two_forwards(drift: Drift, make_model) -> None:
    first = []
    for prompt in PROMPTS:
        rows = []
        for precision in ("float32", "int4"):
            running = make_model(precision=precision).start()
            running.extend(prompt.blocks, room=1)
            rows.append(running.logits.double().log_softmax(-1))
            running.close()
        first.append(torch.nn.functional.kl_div(rows[1], rows[0], log_target=True, reduction="sum").item())
    assert drift.precisions[3].first_token_kl_max == pytest.approx(max(first), rel=1e-6)
    assert drift.precisions[3].first_token_kl_mean == pytest.approx(sum(first) / len(first), rel=1e-6)


def test_bytes_are_those_at_rest(drift: Drift, make_model) -> None:
    layout = make_model().profile.layout
    lengths = [len(block) for prompt in PROMPTS for block in prompt.local_blocks]
    assert (drift.questions, drift.blocks) == (6, 18)
    assert drift.block_tokens_mean == sum(lengths) / 18
    for one in drift.precisions:
        at_rest = sum(payload_nbytes(layout, length, one.precision) for length in lengths)
        assert one.bytes_per_token == at_rest / sum(lengths)
    assert [one.bytes_over_float16 for one in drift.precisions[:2]] == [2, 1]


def test_the_models_store_is_left_alone(make_model) -> None:
    seen: list[int] = []
    # Not known to be fine-tuned, which the caller has been told already: warnings are errors here.
    with pytest.warns(UserWarning, match="not known to be fine-tuned"):
        model = make_model(facts=BlockAttentionFacts())
    measure_drift(model, PROMPTS[:2], ["int8"], max_new_tokens=2, progress=seen.append)
    assert list(model.store.keys()) == []
    assert seen == [1, 2]


@pytest.mark.parametrize(("prompts", "precisions"), [([], ["int8"]), (PROMPTS, [])])
def test_nothing_to_compare_is_refused(make_model, prompts, precisions) -> None:
    with pytest.raises(InputError, match="nothing to compare"):
        measure_drift(make_model(), prompts, precisions)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return benchmark_script("precision")


def test_the_benchmark_writes_what_it_measured(benchmark: ModuleType, monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["precision.py", "--questions", "12", "--output", str(tmp_path)])
    assert benchmark.main() == 0
    directory = tmp_path / "precision-demo-cpu"
    result = json.loads((directory / "precision.json").read_text("utf-8"))
    text = (directory / "precision.md").read_text("utf-8")
    assert capsys.readouterr().out.strip() == text.strip()
    assert SMALL_MODEL_WARNING in text
    assert [one["precision"] for one in result["precisions"]] == list(benchmark.PRECISIONS)
    assert result["settings"]["questions"] == 12
    by_name = {one["precision"]: one for one in result["precisions"]}
    assert by_name["float32"]["unchanged"] == 1
    assert by_name["int8"]["bytes_over_float16"] < 0.53
    assert by_name["int4"]["bytes_over_float16"] < 0.3
    assert by_name["int8"]["answer_kl_mean"] < by_name["int4"]["answer_kl_mean"] < 0.1
    assert by_name["float32"]["right"] == result["right"] >= 6
    assert str(tmp_path) not in json.dumps({**result, "command": ""})


def test_right_answers_are_counted_with_what_changed(benchmark: ModuleType) -> None:
    from blockrag.evaluation.drift import ChangedAnswer

    questions = load_questions()[:3]
    drift = Drift(3, 3, 1, 1.0, tuple(f" {asked.answer} " for asked in questions), ())
    assert benchmark._right(questions, drift) == 3
    assert benchmark._right(questions, drift, (ChangedAnswer(1, questions[1].answer, "wrong"),)) == 2
