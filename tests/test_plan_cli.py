"""`blockrag plan`: what it prints, how it ends, and that it agrees with `blockrag ingest`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import ModelCase, tiny_config, tiny_model
from tiny_tokenizers import plain_tokenizer
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner, Result

from blockrag.cli import app
from blockrag.cli.planning import _duration
from blockrag.codec import encoded_nbytes
from blockrag.demo import forms
from blockrag.model.facts import BlockAttentionFacts, save_facts
from blockrag.model.outline import ModelOutline

QUICK = ["--seconds", "0.1", "--device", "cpu"]
TEXTS = {
    "arvo.txt": "Arvo is a country. The capital of Arvo is Tellin.",
    "brask.txt": "Brask is a country. The capital of Brask is Onder.",
    "cend.md": "# Cend\nCend is a country. The capital of Cend is Umbra.",
}


@pytest.fixture(autouse=True, scope="module")
def _leave_transformers_as_it_was() -> Iterator[None]:
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.set_verbosity(verbosity)
    if bars:
        transformers_logging.enable_progress_bar()


def saved(directory: Path, case: ModelCase, *, weights: bool) -> Path:
    (tiny_model(case) if weights else tiny_config(case)).save_pretrained(directory)
    plain_tokenizer().save_pretrained(directory)
    save_facts(BlockAttentionFacts(block_fine_tuned=True, template=forms.template()), directory)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 32}
    return saved(tmp_path_factory.mktemp("model"), ModelCase("small", "llama", shape), weights=True)


@pytest.fixture(scope="module")
def enormous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which a token takes more than a disk, and of which there are no weights."""
    shape = {"num_hidden_layers": 4, "num_key_value_heads": 4, "head_dim": 1 << 38}
    return saved(tmp_path_factory.mktemp("enormous"), ModelCase("enormous", "llama", shape), weights=False)


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text, "utf-8")
    return folder


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run_json(*arguments: object, code: int = 0) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def test_it_says_what_ingest_then_does(documents: Path, tmp_path: Path, model: Path) -> None:
    where = ["--path", tmp_path / "index"]
    planned = run_json("plan", documents, "--model", model, *where, *QUICK, "--precision", "int8")
    assert not (tmp_path / "index").exists()
    done = run_json("ingest", documents, "--model", model, *where, "--precision", "int8")
    names = {"documents": "documents", "passages": "passages", "blocks": "blocks_new", "tokens": "tokens_new"}
    assert {name: planned[name] for name in names} == {name: done[other] for name, other in names.items()}
    assert planned["bytes"]["int8"] == planned["bytes_new"] == done["bytes_new"]
    assert planned["exact"]
    # Model, precision and passage length are remembered now.
    again = run_json("plan", documents, *where, *QUICK)
    assert (again["model"], again["precision"]) == (str(model), "int8")
    assert (again["blocks_stored"], again["bytes_new"]) == (planned["blocks"], 0)
    assert again["measured"]["gain"] > 0
    assert again["recommended"]["choice"] in ("none", "lazy", "hot part", "all")


def test_people_get_tables(documents: Path, tmp_path: Path, model: Path) -> None:
    result = run("plan", documents, "--model", model, "--path", tmp_path / "index", *QUICK, "-k", "2")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("3 documents, 3 passages, 3 distinct blocks, ")
    for text in (
        "bfloat16, float16 (chosen)",
        "int4",
        "2 passages",
        "breaks even at",
        "hit rate (Zipf 0.8)",
        "recommended",
    ):
        assert text in result.stdout
    assert max(len(line) for line in result.stdout.splitlines()[:-1]) <= 80


def test_what_does_not_fit_ends_with_a_code_of_its_own(documents: Path, tmp_path: Path, enormous: Path) -> None:
    call = ["plan", documents, "--model", enormous, "--path", tmp_path, "--no-measure"]
    refused = run_json(*call, code=3)
    layout = ModelOutline.load(enormous).profile.layout
    assert refused["bytes"]["float32"] > encoded_nbytes(layout, refused["tokens"] // refused["blocks"], "float32")
    assert not refused["fits"]
    result = run(*call)
    assert result.exit_code == 3
    assert "error: it does not fit" in result.stderr
    assert "times" in result.stdout
    # A store with a budget takes no more than that.
    assert run_json(*call, "--budget", "1MB", "--budget", "2KB")["needed_bytes"] < 2_000_000
    run_json(*call, "--budget", "1000000TB", code=3)


def test_without_weights_it_counts_and_says_so(documents: Path, tmp_path: Path, model: Path, enormous: Path) -> None:
    result = run("plan", documents, "--model", enormous, "--path", tmp_path, "--budget", "1MB", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "note: nothing is measured: cannot load" in result.stderr
    assert "recommended" not in result.stdout
    counted = run_json("plan", documents, "--model", model, "--path", tmp_path, "--no-measure")
    assert counted["measured"] is counted["recommended"] is None
    assert counted["bytes"] == run_json("plan", documents, "--model", model, "--path", tmp_path, *QUICK)["bytes"]


def test_a_sample_says_that_it_is_one(documents: Path, model: Path, tmp_path: Path) -> None:
    for number in range(40):
        (documents / f"{number}.txt").write_text(f"Document number {number} is short. " * (1 + number % 3), "utf-8")
    call = ["plan", documents, "--model", model, "--no-measure", "--path", tmp_path]
    result = run(*call, "--sample", "1KB")
    assert "43 documents, about " in result.stdout
    assert "chosen at random, give or take " in result.stdout
    sampled = run_json(*call, "--sample", "1KB")
    assert not sampled["exact"]
    assert sampled["documents_counted"] < sampled["documents"] == 43
    assert run_json(*call, "--sample", "1KB", "--exact")["exact"]


def test_documents_that_cannot_be_used_are_named(documents: Path, model: Path, tmp_path: Path) -> None:
    (documents / "broken.jsonl").write_text("{not json}\n", "utf-8")
    planned = run_json("plan", documents, "--model", model, "--no-measure", "--path", tmp_path, code=1)
    assert planned["documents"] == 3
    assert "broken.jsonl" in planned["failures"][0]["source"]
    (documents / "broken.jsonl").write_text("{not json}\n" * 14, "utf-8")
    result = run("plan", documents, "--model", model, "--no-measure", "--path", tmp_path)
    assert result.stderr.count("error: broken.jsonl") == 10
    assert "... and 4 more" in result.stderr


def test_another_store_is_asked_for_by_its_url(documents: Path, tmp_path: Path, model: Path) -> None:
    memory = run_json("plan", documents, "--model", model, "--store", "memory://", *QUICK)
    assert memory["store"] == "memory://"
    assert memory["needed_bytes"] == memory["bytes_new"], "the index is elsewhere"
    disk = run_json("plan", documents, "--model", model, "--store", f"disk://{tmp_path}/blocks", *QUICK)
    assert disk["free_bytes"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents"]


def test_a_remembered_budget_counts(documents: Path, tmp_path: Path, model: Path) -> None:
    run_json("ingest", documents, "--model", model, "--path", tmp_path / "index", "--max-bytes", "1MB")
    (budget,) = run_json("plan", documents, "--path", tmp_path / "index", "--no-measure")["budgets"]
    assert budget["nbytes"] == 1_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.txt"], "there is no file or folder 'nowhere.txt'"),
        (["{documents}", "--budget", "lots"], "cannot read the size 'lots'"),
        (["{documents}", "--sample", "0"], "less than one byte"),
        (["{documents}", "--store", "cupboard"], "cannot open store"),
        (["{documents}", "--model", "./nowhere"], "no model directory"),
        (["{documents}", "--encoder", "guess"], "unknown encoder"),
        (["{empty}"], "hold no text"),
    ],
)
def test_mistakes_are_named_in_a_line(arguments: list[str], message: str, documents: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    filled = [one.format(documents=documents, empty=tmp_path / "empty") for one in arguments]
    result = run("plan", *filled, "--path", tmp_path / "index", "--no-measure")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_model_that_keeps_no_blocks_is_refused(documents: Path, tmp_path: Path) -> None:
    mamba = saved(tmp_path / "mamba", ModelCase("mamba", "mamba"), weights=True)
    for call in (QUICK, ["--no-measure"]):
        assert run("plan", documents, "--model", mamba, "--path", tmp_path, *call).exit_code == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0012, "1.2 ms"), (0.069, "69 ms"), (3.94, "3.9 s"), (119, "119 s"), (600, "10 min"), (86400, "24 h")],
)
def test_durations_are_in_units_that_people_use(seconds: float, text: str) -> None:
    assert _duration(seconds) == text
    assert _duration(10 * 86400) == "10 days"
