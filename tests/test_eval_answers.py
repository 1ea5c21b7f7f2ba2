"""Evaluation from questions to tables, with the model that ships: answers, resuming, refusals, report, command."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from test_eval_opencompass import TURNS
from tiny_models import ModelCase, tiny_model
from tiny_tokenizers import plain_tokenizer
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner, Result

from blockrag.cli import app
from blockrag.demo import load_corpus, load_questions
from blockrag.errors import DataError, InputError, PromptTooLongError
from blockrag.evaluation.accuracy import summarize
from blockrag.evaluation.accuracy_report import markdown, write_accuracy_report
from blockrag.evaluation.answers import MODES, AnswerSettings, answer_questions, modes_named
from blockrag.evaluation.flops import ModelShape, flops_to_first_token
from blockrag.evaluation.metrics import score
from blockrag.evaluation.predictions import Predictions, read_predictions
from blockrag.evaluation.questions import Selection, read_questions
from blockrag.model.block_model import BlockModel
from blockrag.model.sampling import GenerationOptions

ALL_MODES = ["full", "block", "block-no-reencode"]
SETTINGS = AnswerSettings(max_new_tokens=12, batch_size=4)
MADE = {
    "date": "2026-01-01",
    "commit": None,
    "modified": None,
    "versions": {"blockrag": "0"},
    "machine": {"cpu": "some", "torch_threads": 1, "cores": 2},
}


@pytest.fixture(autouse=True, scope="module")
def _leave_transformers_as_it_was() -> Iterator[None]:
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.set_verbosity(verbosity)
    if bars:
        transformers_logging.enable_progress_bar()


@pytest.fixture(scope="module")
def model() -> BlockModel:
    return BlockModel.from_pretrained("demo")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five lines, two facts and a question about the order on each."""
    rng, corpus = random.Random(3), {passage.id: passage for passage in load_corpus()}
    by_passage: dict[str, list[Any]] = {}
    for question in load_questions(held_out=True):
        by_passage.setdefault(question.passage_id, []).append(question)
    lines = []
    for name, facts in list(by_passage.items())[:5]:
        chosen = [corpus[name], *rng.sample([one for one in corpus.values() if one.id != name], 2)]
        rng.shuffle(chosen)
        questions = [{"question": one.question, "answers": [one.answer], "kind": "fact"} for one in facts[:2]]
        questions.append(
            {"question": "Which of the documents comes first?", "answers": [chosen[0].title], "kind": "order"}
        )
        passages = [{"id": one.id, "title": one.title, "text": one.text, "supports": one.id == name} for one in chosen]
        lines.append({"id": name, "passages": passages, "questions": questions})
    path = tmp_path_factory.mktemp("data") / "demo.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


@pytest.fixture(scope="module")
def answered(model: BlockModel, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return answer(model, data, tmp_path_factory.mktemp("answers"))


def answer(model: BlockModel, data: Path, directory: Path, **changes: Any) -> list[Path]:
    arguments = {"settings": SETTINGS, "label": "demo", "made": MADE, "modes": modes_named(ALL_MODES), **changes}
    asked = arguments.pop("asked", None) or read_questions(data)
    return answer_questions(model, asked, arguments.pop("modes"), directory=directory, **arguments)


def test_every_answer_is_the_models_own(model: BlockModel, data: Path, answered: list[Path]) -> None:
    assert [path.name for path in answered] == ["full.jsonl", "block.jsonl", "block-no-reencode.jsonl"]
    questions = read_questions(data).questions
    options = GenerationOptions(max_new_tokens=12)
    calls: dict[str, Callable[[Any], Any]] = {
        "full": lambda prompt: model.generate(prompt, options, attention="full"),
        "block": lambda prompt: model.generate(prompt, options),
        "block-no-reencode": lambda prompt: model.generate(prompt, options, reencode=False),
    }
    for path in answered:
        header, predictions = read_predictions(path)
        assert header["mode"] == path.stem
        assert len(predictions) == len(questions) == 15
        for one, question in zip(predictions, questions, strict=True):
            prompt = model.template.segment(model.tokenizer, passages=question.passages, question=question.question)
            alone = calls[path.stem](prompt)
            assert (one.prediction, one.finish_reason) == (alone.text, alone.finish_reason)
            assert one.scores == score(alone.text, question.answers).as_json()
            assert (one.index, one.line, one.kind, one.mode) == (
                question.index,
                question.line,
                question.kind,
                path.stem,
            )
            assert one.tokens.new == len(alone.token_ids)
            assert one.tokens.prompt == one.tokens.reused + one.tokens.computed


def test_what_reuse_saves_is_counted_by_first_occurrence(model: BlockModel, data: Path, answered: list[Path]) -> None:
    _, full = read_predictions(answered[0])
    _, block = read_predictions(answered[1])
    questions = read_questions(data).questions
    seen: set[tuple[int, ...]] = set()
    for one, whole, question in zip(block, full, questions, strict=True):
        prompt = model.template.segment(model.tokenizer, passages=question.passages, question=question.question)
        missed = [len(local) for local in prompt.local_blocks if local.token_ids not in seen]
        seen.update(local.token_ids for local in prompt.local_blocks)
        assert one.tokens.missed == tuple(missed)
        assert one.tokens.query == len(prompt.blocks[-1])
        assert one.tokens.blocks == len(prompt.local_blocks)
        assert whole.tokens.computed == prompt.as_full().num_tokens
    assert block[1].tokens.missed == (), "the second question of a line finds everything"


def test_killed_runs_end_with_the_same_files(data: Path, answered: list[Path], tmp_path: Path) -> None:
    places = ["full:4", "block:8"]
    script = Path(__file__).parent / "eval_and_die.py"
    run = subprocess.run(
        [sys.executable, str(script), str(data), str(tmp_path), *places, "never:0"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["full", "9", "block", "9", "never", "0"]
    for mode in ALL_MODES:
        files = {(tmp_path / place / f"{mode}.jsonl").read_bytes() for place in ("full", "block", "never")}
        assert len(files) == 1
        # The headers differ in where they were made.
        assert files.pop().split(b"\n")[1:] == (answered[0].parent / f"{mode}.jsonl").read_bytes().split(b"\n")[1:]


@pytest.mark.parametrize("share", [0.001, 0.4, 0.77, 0.999])
def test_a_file_cut_anywhere_is_completed(
    model: BlockModel, data: Path, answered: list[Path], tmp_path: Path, share: float
) -> None:
    whole = answered[1].read_bytes()
    path = tmp_path / "block.jsonl"
    path.write_bytes(whole[: int(len(whole) * share)])
    assert answer(model, data, tmp_path, modes=modes_named(["block"])) == [path]
    assert path.read_bytes() == whole


def test_a_complete_file_is_left_alone(model: BlockModel, data: Path, answered: list[Path]) -> None:
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in answered]
    said: list[str] = []
    answer(model, data, answered[0].parent, progress=lambda mode, done: said.append(mode))
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in answered] == before
    assert said == []


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"settings": AnswerSettings(max_new_tokens=13, batch_size=4)}, "options.*max_new_tokens 12 there, 13 now"),
        ({"settings": AnswerSettings(max_new_tokens=12, batch_size=5)}, "options.*batch_size"),
        ({"selection": Selection(k=2)}, "data.*digest"),
        ({"selection": Selection(limit=3)}, "data.*questions 15 there, 3 now"),
        ({"label": "other"}, "model.*label"),
        ({"made": {}}, None),
    ],
)
def test_answers_of_another_run_are_refused(
    model: BlockModel, data: Path, answered: list[Path], changes: dict[str, Any], part: str | None
) -> None:
    if "selection" in changes:
        changes = {"asked": read_questions(data, changes["selection"])}
    before = answered[0].read_bytes()
    if part is None:
        answer(model, data, answered[0].parent, **changes)
    else:
        with pytest.raises(InputError, match=rf"full\.jsonl holds answers with another {part}"):
            answer(model, data, answered[0].parent, **changes)
    assert answered[0].read_bytes() == before


def test_answers_of_another_model_are_refused(
    make_model: Callable[..., BlockModel], data: Path, answered: list[Path]
) -> None:
    with pytest.raises(InputError, match=r"another model .*fingerprint"):
        answer(make_model("llama"), data, answered[0].parent)


@pytest.mark.parametrize("content", [b"{}\n", b"not json\n", b'{"question": "a"}\n', b"no line end"])
def test_foreign_files_are_not_touched(model: BlockModel, data: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "block.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="line 1: not the header"):
        answer(model, data, tmp_path)
    assert path.read_bytes() == content
    # Nor does the mode whose file was opened before stand in the way of the next run.
    assert not (tmp_path / "full.jsonl").read_bytes()


def test_a_full_disk_is_reported_and_leaves_whole_answers(answered: list[Path], tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    header, predictions = read_predictions(answered[0])
    path = tmp_path / "full.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with Predictions(path, header) as file:
            file.append(predictions[0])
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
            with pytest.raises(InputError, match=r"cannot write .*full\.jsonl .*the 1 answers that are there stay"):
                file.append(predictions[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    with Predictions(path, header) as file:
        assert file.done == 1
        file.append(predictions[1])
    assert read_predictions(path)[1] == predictions[:2]


def test_a_damaged_line_is_named(model: BlockModel, data: Path, answered: list[Path], tmp_path: Path) -> None:
    lines = answered[0].read_bytes().split(b"\n")
    path = tmp_path / "full.jsonl"
    path.write_bytes(b"\n".join([*lines[:3], b"{}", *lines[4:]]))
    with pytest.raises(DataError, match=r"full\.jsonl, line 4: not a prediction"):
        answer(model, data, tmp_path, modes=modes_named(["full"]))
    path.write_bytes(b"\n".join([*lines[:3], *lines[4:]]))
    with pytest.raises(InputError, match="line 4: holds answer 3, not 2"):
        answer(model, data, tmp_path, modes=modes_named(["full"]))


def test_prompts_that_are_too_long_count_as_wrong(make_model: Callable[..., BlockModel], tmp_path: Path) -> None:
    tiny = make_model("llama")
    tiny.profile = replace(tiny.profile, max_tokens=200)  # type: ignore[type-var]
    long = {"passages": [{"text": "word " * 300}], "question": "What?", "answers": ["word"]}
    short = {"passages": [{"text": "word"}], "question": "What?", "answers": ["word"]}
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (short, long, short)), "utf-8")
    files = answer(tiny, path, tmp_path / "out", modes=modes_named(["block"]))
    _, predictions = read_predictions(files[0])
    assert [bool(one.error) for one in predictions] == [False, True, False]
    assert "the model can place 200" in predictions[1].error
    assert predictions[1].scores == {"em": 0, "substr_em": 0, "f1": 0, "union_f1": 0}
    result = summarize(files)
    assert result["rows"][0]["errors"] == 1
    assert result["rows"][0]["groups"]["all"]["n"] == 3
    assert any("1 questions could not be asked and count as wrong" in warning for warning in result["warnings"])


def test_without_composition_there_is_a_limit_as_well(tmp_path: Path) -> None:
    """Learned positions end: an answer before them, a question beyond them is one that could not be asked."""
    gpt2 = tiny_model(ModelCase("gpt2", "gpt2", {"max_position_embeddings": 64}))
    full = BlockModel(gpt2, plain_tokenizer(), attention="full")
    assert full.profile is None

    def line(words: int) -> dict[str, Any]:
        return {"passages": [{"text": "w " * words}], "question": "What?", "answers": ["w"]}

    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(line(words)) + "\n" for words in range(1, 200, 6)), "utf-8")
    files = answer(full, path, tmp_path / "out", modes=modes_named(["full"]))
    _, predictions = read_predictions(files[0])
    asked = [one for one in predictions if not one.error]
    assert 1 < len(asked) < len(predictions)
    assert all("the model can place 64" in one.error for one in predictions[len(asked) :])
    assert asked[0].tokens.new == 12
    assert asked[-1].tokens.prompt + asked[-1].tokens.new == 64
    with pytest.raises(PromptTooLongError, match="the model can place 64"):
        full.generate(full.template.segment(full.tokenizer, passages=[], question="w " * 200))


def test_modes_by_name() -> None:
    assert [mode.name for mode in modes_named(["block", "full", "block"])] == ["block", "full"]
    assert list(MODES) == ALL_MODES
    with pytest.raises(InputError, match=r"unknown modes \['sparse'\]"):
        modes_named(["full", "sparse"])
    with pytest.raises(InputError, match="unknown modes"):
        modes_named([])


def rows_of(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    lines = text.split(f"## {heading}")[1].split("\n")
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    table = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return [table[0], *table[2:]]


def test_the_tables_say_what_the_answers_are_worth(answered: list[Path]) -> None:
    result = summarize(answered, command="blockrag eval demo", note="a test")
    text = markdown(result)
    header, *rows = rows_of(text, "All questions")
    assert header == ["model", "mode", "EM", "Substr-EM", "F1", "union F1", "Δ EM", "Δ Substr-EM", "Δ F1"]
    for row, path in zip(rows, answered, strict=True):
        _, predictions = read_predictions(path)
        share = 100 * sum(one.scores["em"] for one in predictions) / len(predictions)
        assert row[:2] == ["demo", path.stem]
        assert row[2].startswith(f"{share:.1f} ± ")
    assert rows[0][6:] == ["reference"] * 3
    for kind, count in (("fact", 10), ("order", 5)):
        assert len(rows_of(text, f"Questions of kind {kind}: {count}")) == 4
    order = rows_of(text, "Questions of kind order: 5")
    assert float(order[3][3].split(" ")[0]) < float(order[2][3].split(" ")[0]), "the ablation cannot tell the order"
    assert rows_of(text, "Retrieval")[0] == ["k = 1", "k = 2", "k = 3"]
    assert rows_of(text, "Retrieval")[1][2] == "100.0 %"
    assert "**Warning: 5 independent lines" in text
    for said in ("`blockrag eval demo`", "a test", "digest", "marks as evidence", "15 questions, on 5 lines"):
        assert said in text


def test_the_differences_are_paired_and_clustered(answered: list[Path]) -> None:
    _, full = read_predictions(answered[0])
    _, ablated = read_predictions(answered[2])
    result = summarize(answered)["rows"][2]["groups"]["all"]["differences"]["em"]
    by_line: dict[int, list[float]] = {}
    for one, other in zip(ablated, full, strict=True):
        by_line.setdefault(one.line, []).append(one.scores["em"] - other.scores["em"])
    value = sum(map(sum, by_line.values())) / 15
    squares = sum((sum(line) - value * len(line)) ** 2 for line in by_line.values())
    assert result["value"] == pytest.approx(value)
    assert result["se"] == pytest.approx((5 / 4 * squares) ** 0.5 / 15)
    assert result["differs"] == (abs(value) > 2 * result["se"])


def test_flops_are_the_mean_over_the_questions(model: BlockModel, answered: list[Path]) -> None:
    result = summarize(answered)
    shape = ModelShape.from_config(model.model.config)
    _, predictions = read_predictions(answered[1])
    counts = [
        flops_to_first_token(
            num_tokens=one.tokens.query,
            shape=shape,
            reused_tokens=one.tokens.reused,
            missed_blocks=one.tokens.missed,
        )
        for one in predictions
    ]
    work = result["rows"][1]["work"]
    assert work["flops"]["paper"] == pytest.approx(sum(one.paper for one in counts) / 15)
    assert work["flops"]["with_reuse"] == pytest.approx(sum(one.with_reuse or 0 for one in counts) / 15)
    assert work["flops"]["paper"] < work["flops"]["with_attention"] < work["flops"]["with_reuse"]
    assert 0 < work["saved_percent"]["with_reuse"] < work["saved_percent"]["paper"] < 100
    assert "saved_percent" not in result["rows"][0]["work"]


def test_what_cannot_be_compared_is_refused(
    model: BlockModel, data: Path, answered: list[Path], tmp_path: Path
) -> None:
    other = answer(
        model, data, tmp_path, asked=read_questions(data, Selection(order="reversed")), modes=modes_named(["full"])
    )
    with pytest.raises(InputError, match="answer different questions"):
        summarize([answered[0], *other])
    other[0].write_bytes(b"\n".join(other[0].read_bytes().split(b"\n")[:4]) + b"\n")
    with pytest.raises(InputError, match="holds 3 of 15 answers"):
        summarize(other)
    with pytest.raises(InputError, match="no row base:full to compare with; pass one of demo:full, demo:block"):
        summarize(answered, reference=("base", "full"))
    with pytest.raises(InputError, match="nothing to summarize"):
        summarize([])


def edited(path: Path, copy: Path, change: Callable[[dict[str, Any], list[dict[str, Any]]], None]) -> Path:
    """A copy of a file of predictions, changed."""
    header, *lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    change(header, lines)
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text("".join(json.dumps(line) + "\n" for line in (header, *lines)), "utf-8")
    return copy


def test_other_lengths_and_answers_without_scores_are_refused(answered: list[Path], tmp_path: Path) -> None:
    longer = edited(
        answered[1], tmp_path / "longer.jsonl", lambda header, _: header["options"].update(max_new_tokens=200)
    )
    with pytest.raises(InputError, match=r"longer\.jsonl holds answers of at most 200 tokens, .*full\.jsonl of 12"):
        summarize([answered[0], longer])
    bare = edited(answered[1], tmp_path / "bare.jsonl", lambda _, lines: [line["scores"].clear() for line in lines])
    with pytest.raises(InputError, match=r"bare\.jsonl holds answers without scores"):
        summarize([bare])


def test_a_kind_that_only_some_questions_have_has_a_table(answered: list[Path], tmp_path: Path) -> None:
    def unmark(_: Any, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            line["kind"] = "" if line["kind"] == "fact" else line["kind"]

    def one_kind(header: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        header["model"]["label"] = "a|b"
        for line in lines:
            line["kind"] = "fact"

    text = markdown(summarize([edited(answered[0], tmp_path / "some.jsonl", unmark)]))
    assert len(rows_of(text, "Questions of kind order: 5")) == 2
    text = markdown(summarize([edited(answered[0], tmp_path / "one.jsonl", one_kind)]))
    assert "Questions of kind" not in text
    assert "| a\\|b | full |" in text, "a bar in a label is no border of a cell"


def test_prompts_beyond_the_training_are_pointed_out(answered: list[Path], tmp_path: Path) -> None:
    lines = answered[1].read_text("utf-8").split("\n")
    header = json.loads(lines[0])
    header["model"] |= {"trained_blocks": 3, "trained_tokens": 100, "block_fine_tuned": None}
    path = tmp_path / "block.jsonl"
    path.write_text("\n".join([json.dumps(header), *lines[1:]]), "utf-8")
    warnings = " ".join(summarize([path])["warnings"])
    assert "15 prompts exceed the 100 tokens it was trained with" in warnings
    assert "15 prompts exceed the 3 blocks" in warnings
    assert "not known to be fine-tuned" in warnings


def test_the_report_has_a_picture(answered: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = summarize(answered)
    report = write_accuracy_report(result, tmp_path)
    assert [path.name for path in report.files] == ["accuracy.json", "accuracy.md", "accuracy.png"]
    assert json.loads(report.files[0].read_text("utf-8")) == result
    assert report.files[1].read_text("utf-8") == report.text == markdown(result)
    colors_are_there(report.files[2])
    # The next report has a curve: the bars of this one would be taken for its.
    steps = write_accuracy_report(summarize(answered, steps={"demo": 10}), tmp_path)
    assert [path.name for path in tmp_path.glob("*.png")] == [steps.files[2].name] == ["curve.png"]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write the report into .*pass another --output"):
        write_accuracy_report(result, tmp_path / "file")


def test_checkpoints_make_a_curve(answered: list[Path], tmp_path: Path) -> None:
    """The same answers under other names, as checkpoints of two runs, one asked in one mode only."""
    pytest.importorskip("matplotlib")
    files = []
    for name in ("checkpoint-100", "checkpoint-20", "again"):
        for path in answered[: 1 if name == "again" else 2]:
            relabel = partial(lambda name, header, _: header["model"].update(label=name), name)
            files.append(edited(path, tmp_path / name / path.name, relabel))
    steps = {"checkpoint-100": 100, "checkpoint-20": 20, "again": 30}
    report = write_accuracy_report(summarize(files, steps=steps), tmp_path / "report")
    header, *rows = rows_of(report.text, "By training step")
    assert header == ["step", "full", "block"]
    assert [row[0] for row in rows] == ["20", "30", "100"]
    assert [row[2] == "-" for row in rows] == [False, True, False]
    assert report.files[2].name == "curve.png"
    colors_are_there(report.files[2])
    same = summarize(files, steps=dict.fromkeys(steps, 100))
    colors_are_there(write_accuracy_report(same, tmp_path / "same").files[2])


def colors_are_there(path: Path) -> None:
    """A picture that shows both modes in their colors."""
    from matplotlib.image import imread

    pixels = imread(str(path))[..., :3]
    assert min(pixels.shape[:2]) > 400
    for color in ((0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)):
        near = abs(pixels * 255 - color).max(-1) < 3
        assert near.sum() > 50


# -- The command ---------------------------------------------------------------------------------------------------


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


SHORT = ["--max-new-tokens", "8", "--limit", "4"]


def test_the_command_writes_tables_and_goes_on(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = call("demo", "--data", data, "--output", output, *SHORT)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.rstrip() == (output / "accuracy.md").read_text("utf-8").rstrip()
    assert "demo, block: 4 of 4 questions" in result.stderr
    assert sorted(path.name for path in (output / "demo").iterdir()) == ["block.jsonl", "full.jsonl"]
    before = (output / "demo" / "block.jsonl").read_bytes()
    again = call("demo", "--data", data, "--output", output, *SHORT, "--modes", "block", "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout)["rows"][0]["mode"] == "block"
    assert (output / "demo" / "block.jsonl").read_bytes() == before
    other = call("demo", "--data", data, "--output", output, *SHORT, "-k", "1")
    assert other.exit_code == 2
    assert "holds answers with another data" in other.stderr


def test_several_models_in_one_table(data: Path, tmp_path: Path) -> None:
    result = call(
        "before=demo", "after=demo", "--data", data, "--output", tmp_path, *SHORT, "--modes", "block",
        "--reference", "after:block",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    _, *rows = rows_of(result.stdout, "All questions")
    assert [row[:2] for row in rows] == [["before", "block"], ["after", "block"]]
    assert [row[6] for row in rows] == ["+0.0 ± 0.0", "reference"]
    assert "blockrag eval before=demo after=demo --data demo.jsonl" in result.stdout
    assert "--reference after:block`" in result.stdout


def test_checkpoints_of_a_training_directory(model: BlockModel, data: Path, tmp_path: Path) -> None:
    from blockrag.model.facts import save_facts

    for step in (4, 10):
        folder = tmp_path / "run" / "checkpoints" / f"checkpoint-{step}"
        model.model.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        save_facts(model.facts, folder)
    (tmp_path / "run" / "checkpoints" / "logs").mkdir()
    result = call("--checkpoints", tmp_path / "run", "--data", data, "--output", tmp_path / "out", *SHORT)
    assert result.exit_code == 0, result.stderr
    assert [row[0] for row in rows_of(result.stdout, "By training step")] == ["step", "4", "10"]


def test_questions_over_ones_own_index(tmp_path: Path) -> None:
    questions = load_questions()[:3]
    texts = {passage.id: passage for passage in load_corpus()}
    documents = tmp_path / "documents"
    documents.mkdir()
    for question in questions:
        passage = texts[question.passage_id]
        (documents / f"{passage.id}.txt").write_text(f"{passage.title}\n{passage.text}", "utf-8")
    made = CliRunner().invoke(app, ["ingest", str(documents), "--path", str(tmp_path / "index")])
    assert made.exit_code == 0, made.stderr
    path = tmp_path / "own.jsonl"
    lines = [{"question": one.question, "answers": [one.answer]} for one in questions]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    result = call(
        "demo",
        "--data",
        path,
        "--index",
        tmp_path / "index",
        "--output",
        tmp_path / "out",
        "-k",
        "1",
        "--modes",
        "block",
    )
    assert result.exit_code == 0, result.stderr
    assert "contain a right answer" in result.stdout
    assert re.search(r"\| 100\.0 % \|", result.stdout), "the lexical index finds the passage"
    without = call("demo", "--data", path, "--output", tmp_path / "none")
    assert without.exit_code == 2
    assert "line 1: has no passages" in without.stderr


def test_a_model_that_cannot_be_composed_is_evaluated_in_full(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    tiny_model(ModelCase("gpt2", "gpt2")).save_pretrained(folder)
    plain_tokenizer().save_pretrained(folder)
    common = (folder, "--data", data, "--output", tmp_path / "out", "--limit", "2", "--max-new-tokens", "2", "-k", "1")
    result = call(*common, "--modes", "full")
    assert result.exit_code == 0, result.stderr
    _, *rows = rows_of(result.stdout, "All questions")
    assert [row[:2] for row in rows] == [["gpt2", "full"]]
    refused = call(*common, "--modes", "full,block")
    assert refused.exit_code == 1
    assert "gpt2" in refused.stderr
    assert "error:" in refused.stderr


def test_benchmarks_go_to_opencompass(tmp_path: Path) -> None:
    path = tmp_path / "gsm8k.jsonl"
    lines = [{"prompt": TURNS, "gold": "6"}, {"prompt": TURNS.replace("3+3", "4+4"), "gold": "8"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    result = call("demo", "--data", path, "--output", tmp_path / "out", "--icl", "gsm8k", "--max-new-tokens", "4")
    assert result.exit_code == 0, result.stderr
    for mode in ("full", "block"):
        file = tmp_path / "out" / "opencompass" / "predictions" / f"demo_{mode}" / "gsm8k.json"
        loaded = json.loads(file.read_text("utf-8"))
        assert [loaded[str(n)]["origin_prompt"] for n in range(2)] == [line["prompt"] for line in lines]
        assert [loaded[str(n)]["gold"] for n in range(2)] == ["6", "8"]
        assert all(isinstance(loaded[str(n)]["prediction"], str) for n in range(2))
    _, block = read_predictions(tmp_path / "out" / "demo" / "block.jsonl")
    assert block[0].tokens.blocks == 2
    assert block[1].tokens.missed == (), "the demonstrations are shared"
    assert block[0].scores == {}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "there is no model to evaluate"),
        (["demo", "demo"], "several models are called demo"),
        (["demo", "--modes", "sparse"], "unknown modes"),
        (["./nowhere"], "no model directory"),
        (["--checkpoints", "nowhere"], "there is no checkpoint-N"),
        (["demo", "--turn-end", "x"], "belong to prompts of --icl"),
        (["demo", "--icl", "bbh", "-k", "3"], "leave -k out"),
        (["demo", "--icl", "bbh", "--order", "reversed", "--note", "x"], "leave --note, --order out"),
        (["demo", "--reference", "demo"], "--reference demo is no row of the table; pass one of demo:full, demo:block"),
        (["demo", "--reference", "demo:block-no-reencode"], "is no row"),
        (["..=demo"], "'..' cannot name a directory"),
    ],
)
def test_mistakes_in_the_call(data: Path, tmp_path: Path, arguments: list[str], problem: str) -> None:
    result = call(*arguments, "--data", data, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert problem in result.stderr
    assert not (tmp_path / "out").exists()
