"""benchmarks/squad.py in tiny form: from two files in SQuAD's format to trained models, answers and a result."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmark_scripts import benchmark_script
from transformers import AutoConfig, AutoTokenizer, TrainerCallback

from blockrag.errors import InputError
from blockrag.evaluation.predictions import read_predictions
from blockrag.evaluation.questions import Selection, read_questions
from blockrag.finetune.run import finetune
from blockrag.model.facts import load_facts

ROOT = Path(__file__).parent.parent
REAL = ROOT.parent / "shared" / "data" / "squad-dev-v1.1.json"
PLACES = ("Arvo", "Brask", "Celd", "Dorun", "Eskel", "Fanno", "Gorm", "Hulda", "Ister", "Jorvik", "Kaldi", "Lumen")
SMALL = ["--hidden", "64", "--layers", "1", "--vocabulary", "300", "--gold", "3", "--deals", "2", "--seed", "3"]
SHORT = ["--steps", "3", "--block-steps", "2", "--questions", "7", "--held-out", "2", "--max-new-tokens", "3"]
MODES = ["full", "block", "block-no-reencode"]


def squad_file(path: Path, word: str) -> Path:
    """Twelve paragraphs in four articles, with two questions each."""
    articles = [
        {
            "title": f"{word}_{number}",
            "paragraphs": [
                {
                    "context": f"The {word} of {place} has {len(place)} gates. It was built by {place[::-1].title()}.",
                    "qas": [
                        {
                            "question": f"How many gates has the {word} of {place}?",
                            "answers": [{"text": f"{len(place)}"}],
                        },
                        {"question": f"Who built {place}?", "answers": [{"text": place[::-1].title()}]},
                    ],
                }
                for place in PLACES[number::4]
            ],
        }
        for number in range(4)
    ]
    path.write_text(json.dumps({"version": "1.1", "data": articles}), "utf-8")
    return path


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return benchmark_script("squad")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("squad")
    train, dev = squad_file(directory / "train.json", "tower"), squad_file(directory / "dev.json", "bridge")
    return ["--train", str(train), "--dev", str(dev)]


@pytest.fixture(scope="module")
def out(benchmark: ModuleType, files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "out"
    run(benchmark, *files, *SMALL, *SHORT, "--out", str(directory), "--note", "a test")
    return directory


@pytest.fixture(scope="module")
def result(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "squad.json").read_text("utf-8")))


def run(benchmark: ModuleType, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["squad.py", *arguments])
        assert benchmark.main() == 0


def without_times(result: Mapping[str, Any]) -> dict[str, Any]:
    """All of a result that must come out again."""
    training = [{name: value for name, value in one.items() if name != "seconds"} for one in result["training"]]
    return {name: value for name, value in result.items() if name not in ("date", "commit", "modified")} | {
        "training": training
    }


def test_both_trainings_are_made_and_counted(out: Path, result: dict[str, Any]) -> None:
    full, both = result["training"]
    assert [one["settings"]["variants"] for one in (full, both)] == ["full", "both"]
    assert [one["steps"] for one in (full, both)] == [3, 2]
    assert {one["settings"]["optimizer"] for one in (full, both)} == {"muon"}
    # Twelve paragraphs by threes, dealt twice; in both attentions twice as many rows.
    assert [one["rows"] for one in (full, both)] == [8, 16]
    assert full["passes"] == pytest.approx(3 / 8)
    assert full["pass_tokens"] * full["passes"] == pytest.approx(full["tokens"], rel=0.01)
    assert both["pass_tokens"] == pytest.approx(2 * full["pass_tokens"], rel=0.2)
    for stage in (full, both):
        assert 0 < stage["watched"]["block_loss"] < 20
        assert stage["losses"][0][0] == 1
    assert load_facts(out / "before" / "block_attention.json").block_fine_tuned is False
    after = load_facts(out / "after" / "block_attention.json")
    assert after.block_fine_tuned
    # The template's opening, and three paragraphs.
    assert after.max_blocks == 4
    assert after.template is not None
    assert after.template.block_attention_prefix == "[Block-Attention]"
    assert not (out / "before" / "checkpoints").exists()


def test_the_tokenizer_is_learned_from_the_training_file_alone(out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(out / "untrained")
    assert AutoConfig.from_pretrained(out / "untrained").vocab_size == len(tokenizer) <= 300
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "<bos>", "<eos>"]
    assert len(tokenizer.encode(" tower")) < len(tokenizer.encode(" bridge"))
    assert tokenizer.decode(tokenizer.encode("Größe: 3 €\n")) == "Größe: 3 €\n"


def test_five_and_ten_passages_ask_the_same_questions(out: Path, result: dict[str, Any]) -> None:
    asked = {}
    for passages in (5, 10):
        selection = Selection(passages, "shuffled", 7, 3)
        asked[passages] = read_questions(out / "data" / "dev.jsonl", selection)
        for model in ("before", "after"):
            for mode in MODES:
                header, answers = read_predictions(out / "answers" / f"{passages}-passages" / model / f"{mode}.jsonl")
                assert header["data"]["digest"] == asked[passages].describe()["digest"]
                assert [one.question for one in answers] == [one.question for one in asked[passages].questions]
                # The opening of the template is a block as well.
                assert mode == "full" or {one.tokens.blocks for one in answers} == {passages + 1}
    for few, many in zip(asked[5].questions, asked[10].questions, strict=True):
        assert (few.question, few.line) == (many.question, many.line)
        assert len(few.passages) == 5
        assert {one.id for one in few.passages} < {one.id for one in many.passages}
        # Its own paragraph is among them, and says the answer.
        assert any(few.answers[0] in one.text for one in few.passages if one.title.startswith("bridge"))
    own = [next(at for at, one in enumerate(few.passages) if few.answers[0] in one.text) for few in asked[5].questions]
    assert len(set(own)) > 1, "a question's own paragraph must not always stand at the same place"
    for model in ("before", "after"):
        for passages in ("5", "10"):
            summary = result["asked"][model][passages]
            assert [row["mode"] for row in summary["rows"]] == MODES
            assert summary["reference"] == {"model": model, "mode": "full"}
            assert {row["groups"]["all"]["n"] for row in summary["rows"]} == {7}


def test_the_result_says_what_it_is_and_holds_no_text_of_the_data(out: Path, result: dict[str, Any]) -> None:
    text = (out / "squad.md").read_text("utf-8")
    assert "far too short to learn" in text
    assert "Not run; by arithmetic alone." in text
    assert "7 prompts exceed the 4 blocks it was trained with" in text
    assert result["command"] in text
    assert "a test" in text
    published = text + json.dumps(result)
    for word in (*PLACES, "gates", "built", str(out.parent), str(ROOT)):
        assert word not in published
    assert result["sources"]["dev"]["name"] == "dev.json"
    assert text.count("| after | block-no-reencode |") == text.count("| before | full |") == 2


def test_a_run_long_enough_is_not_called_short(benchmark: ModuleType, result: dict[str, Any]) -> None:
    full, both = ({**stage, "passes": 4.0} for stage in result["training"])
    # Four passes in full attention, and four in each of both.
    assert "far too short" not in benchmark.markdown({**result, "training": [full, both]})
    both["passes"] = 2.9
    assert "9.80 passes" in benchmark.markdown({**result, "training": [full, both]})


def test_the_arithmetic_counts_the_model_that_its_command_makes(result: dict[str, Any], benchmark: ModuleType) -> None:
    learns = result["learns"]
    words = learns["command"].split()[2:]
    given = vars(benchmark._parser().parse_args(words))
    options = benchmark.Options(**{name: value for name, value in given.items() if name in result["options"]})
    assert (options.hidden, options.deals, options.seed, options.bf16) == (384, 20, 3, True)
    # Layers of 6 heads and 3 for keys and values, an MLP three times as wide, and norms; embeddings are tied.
    layer = 384 * 64 * (6 + 3 + 3 + 6) + 3 * 384 * 1152 + 2 * 384
    assert learns["parameters"] == options.vocabulary * 384 + 8 * layer + 384
    # Four lines to a pass.
    assert options.steps * options.batch_rows >= 20 * 4 > (options.steps - 1) * options.batch_rows
    assert options.block_steps * options.batch_rows >= 2 * 5 * 4 > (options.block_steps - 1) * options.batch_rows
    per_pass = result["training"][0]["pass_tokens"] / 2
    assert learns["tokens"] == pytest.approx(30 * per_pass, rel=1e-6)
    assert learns["flops"] > 6 * learns["tokens"] * learns["parameters"]
    assert learns["seconds"] == pytest.approx(learns["flops"] / 98.9e12)


class Killed(TrainerCallback):
    """Ends the process's training behind its last checkpoint."""

    def on_evaluate(self, args: object, state: object, control: object, **kwargs: object) -> None:
        raise KeyboardInterrupt


def test_the_same_command_goes_on_where_it_was(
    benchmark: ModuleType, files: list[str], out: Path, result: dict[str, Any], tmp_path: Path
) -> None:
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    # As if it had been killed while the first model answered, and while the second was trained.
    cut = copy / "answers" / "10-passages" / "before" / "block.jsonl"
    cut.write_bytes(b"".join(cut.read_bytes().splitlines(keepends=True)[:4]))
    for gone in ("after", "answers/5-passages/after", "answers/10-passages/after"):
        shutil.rmtree(copy / gone)
    (copy / "squad.json").unlink()
    _, both = benchmark._settings(benchmark.Options(**result["options"]))
    data = copy / "data"
    with pytest.raises(KeyboardInterrupt):
        finetune(
            copy / "before",
            [data / "train.jsonl"],
            copy / "after",
            both,
            eval_data=[data / "watched.jsonl"],
            too_long="skip",
            callbacks=[Killed()],
        )
    assert not (copy / "after" / "config.json").exists()
    kept = (copy / "before" / "model.safetensors").stat().st_mtime_ns
    run(benchmark, *files, *SMALL, *SHORT, "--out", str(copy), "--note", "a test")
    again = json.loads((copy / "squad.json").read_text("utf-8"))
    assert without_times(again) == without_times(result)
    # How long a training took that was stopped, nobody knows.
    assert again["training"][0]["seconds"] == result["training"][0]["seconds"] > 0
    assert again["training"][1]["seconds"] is None
    assert "| 0.12 | - | - |" in (copy / "squad.md").read_text("utf-8")
    assert (copy / "before" / "model.safetensors").stat().st_mtime_ns == kept
    assert len(cut.read_bytes().splitlines()) == 1 + 7


def test_another_run_s_directory_is_left_alone(benchmark: ModuleType, files: list[str], out: Path) -> None:
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(InputError, match=r"holds a run with steps=3; pass the same options, or another --out"):
        run(benchmark, *files, *SMALL, *SHORT, "--steps", "4", "--out", str(out))
    assert sorted(path.name for path in out.iterdir()) == before


def test_a_width_without_whole_heads_is_refused(benchmark: ModuleType, files: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hidden=100 must be a multiple of 64"):
        run(benchmark, *files, *SMALL, *SHORT, "--hidden", "100", "--out", str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not REAL.is_file(), reason="needs SQuAD's own file")
def test_squad_dev_gives_every_question_its_own_paragraph(benchmark: ModuleType, tmp_path: Path) -> None:
    options = benchmark.Options(gold=10, held_out=3)
    benchmark._lines(REAL, REAL, tmp_path, options)
    for passages in (5, 10):
        asked = read_questions(tmp_path / "dev.jsonl", Selection(passages, "shuffled"))
        assert len(asked.questions) == 10_570
        assert asked.recall["flag"]["at"]["1"] == 1
        assert {len(one.passages) for one in asked.questions} == {passages}
    assert len((tmp_path / "train.jsonl").read_text("utf-8").splitlines()) == 207
    assert len((tmp_path / "watched.jsonl").read_text("utf-8").splitlines()) == 3
