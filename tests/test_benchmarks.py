"""`blockrag bench` runs end to end on a tiny model, and its arithmetic holds; no time asserted."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from test_exactness import prompt_of
from transformers.utils import logging as transformers_logging
from typer.main import get_command
from typer.testing import CliRunner, Result

from blockrag.cli import app
from blockrag.errors import InputError
from blockrag.evaluation.flops import flops_to_first_token
from blockrag.evaluation.speed import memory
from blockrag.evaluation.speed.bounds import Work, model_shape
from blockrag.evaluation.speed.compose import ComposeSettings
from blockrag.evaluation.speed.decode import DecodeSettings
from blockrag.evaluation.speed.forward import stock_attention
from blockrag.evaluation.speed.frame import crossing, slope, spread, take_turns
from blockrag.evaluation.speed.machine import Rates, busy_share, busy_warning, filesystem_of
from blockrag.evaluation.speed.memory import MemorySettings
from blockrag.evaluation.speed.prompts import PromptSettings, cut, random_prompt
from blockrag.evaluation.speed.seed import SeedBlocks
from blockrag.evaluation.speed.shapes import SubjectSpec
from blockrag.evaluation.speed.steps import STEPS
from blockrag.evaluation.speed.ttft import MODES, TtftSettings, available_modes
from blockrag.evaluation.speed.ways import composed
from blockrag.model.block_model import BlockModel
from blockrag.stores import DiskStore, MemoryStore

ROOT = Path(__file__).parent.parent
PROMPTS = ["--query-tokens", "5", "--block-tokens", "8,16"]
SMOKE = ["--shape", "smoke", *PROMPTS]
KEY = "ab" * 32


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments], prog_name="blockrag")


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that holds a block of somebody else's."""
    path = tmp_path_factory.mktemp("given") / "store"
    store = DiskStore(path)
    store.put(KEY, b"somebody else's block")
    store.close()
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, store_path: Path) -> Path:
    output = tmp_path_factory.mktemp("bench")
    modes = ["--modes", ",".join(reversed(available_modes())), "--once", "cold", "--store", f"disk://{store_path}"]
    points = ["--lengths", "96,5,32,1K", "--repeats", "2", "--passages", "100"]
    done = bench("ttft", *SMOKE, *points, *modes, "--note", "a test", "--output", str(output))
    assert done.exit_code == 0, done.output
    directory = output / "ttft-smoke-cpu"
    assert done.stdout.strip() == (directory / "ttft.md").read_text("utf-8").strip()
    return directory


@pytest.fixture(scope="module")
def result(report: Path) -> dict[str, Any]:
    return dict(json.loads((report / "ttft.json").read_text("utf-8")))


def test_a_result_says_what_was_measured_and_where(report: Path, result: dict[str, Any], store_path: Path) -> None:
    assert result["schema"] == 2
    assert result["note"] == "a test"
    assert result["versions"].keys() == {"blockrag", "python", "torch", "transformers"}
    assert {"cpu", "cores", "torch_threads", "omp_num_threads", "memory_bytes"} <= result["machine"].keys()
    assert min(result["rates"]["copy_bytes_per_s"], result["rates"]["matrix_flops_per_s"]) > 0
    assert result["model"]["name"] == "smoke"
    assert result["model"]["parameters"] > 0
    assert result["commit"] is None or len(result["commit"]) == 40
    # Neither this machine's paths nor its name.
    text = (report / "ttft.json").read_text("utf-8")
    for path in (str(report.parent), str(ROOT), str(store_path), store_path.parent.name):
        assert path not in text


def test_every_sample_of_every_mode_is_kept(result: dict[str, Any]) -> None:
    modes = [*available_modes(), "store disk"]
    assert [point["prompt_tokens"] for point in result["points"]] == [5, 32, 96, 1024]
    for point in result["points"]:
        assert list(point["modes"]) == modes
        for whole in ("full", "stock"):
            assert point[f"{whole}_over"]["ttft_s"].keys() == {*modes} - {whole}
        for name, mode in point["modes"].items():
            for taken in (mode["ttft_s"], mode["processor_s"]):
                assert taken["n"] == len(taken["samples"]) == (1 if name == "cold" else 2)
                assert 0 < taken["min"] <= taken["median"] <= taken["max"]
            assert mode["bound_s"] > 0
            assert {"compose_s", "query_prefill_s", "other_s"} <= mode["parts_s"].keys()
        assert point["steps_s"].keys() == STEPS.keys()
        tokens = {name: mode["first_token"] for name, mode in point["modes"].items()}
        assert tokens.pop("full") == tokens.pop("stock")
        assert set(tokens.values()) == {tokens["memory"]}


def test_a_prompt_without_passages_is_the_query_alone(result: dict[str, Any]) -> None:
    query, *others = result["points"]
    assert (query["blocks"], query["bytes_at_rest"], query["cache_bytes"], query["search_s"]) == (0, 0, 0, None)
    assert query["flops"]["full"] == query["flops"]["block"]
    assert result["break_even"]["shortest_measured"] == 32
    assert result["growth"] == {"lengths": [1024], "modes": {}}
    for point in others:
        # float16 at rest, float32 in the cache; headers come on top.
        assert point["bytes_at_rest"] > point["cache_bytes"] / 2 > 0
        assert point["search_s"]["n"] == 2
        assert point["flops"]["reduction_percent"]["paper"] == pytest.approx(100 * (1 - 5 / point["prompt_tokens"]))


def test_a_given_store_holds_what_it_held_before(result: dict[str, Any], store_path: Path) -> None:
    assert "store disk" in result["modes"]
    store = DiskStore(store_path)
    assert list(store.keys()) == [KEY]
    store.close()


def test_table_and_plots_are_written(report: Path) -> None:
    text = (report / "ttft.md").read_text("utf-8")
    assert "full / memory" in text
    assert "`blockrag bench ttft --shape smoke --device cpu" in text
    for name in ("ttft.png", "ttft-parts.png"):
        png = (report / name).read_bytes()
        assert png.startswith(b"\x89PNG\r\n")
        assert len(png) > 10_000


def test_the_recorded_command_repeats_the_measurement(result: dict[str, Any], tmp_path: Path) -> None:
    words = result["command"].split()
    assert words[:2] == ["blockrag", "bench"]
    again = bench(*words[2:], "--output", str(tmp_path), "--json")
    assert again.exit_code == 0, again.output
    repeated = json.loads(again.stdout)
    for key in ("command", "settings", "model"):
        assert repeated[key] == result[key]
    for before, after in zip(result["points"], repeated["points"], strict=True):
        for key in ("prompt_tokens", "blocks", "bytes_at_rest", "cache_bytes", "flops"):
            assert after[key] == before[key]


def test_the_campaign_for_the_record_is_of_commands_that_parse() -> None:
    script = (ROOT / "benchmarks" / "run.sh").read_text("utf-8").replace("\\\n", " ")
    lines = [line for line in re.findall(r"^[^#\n]*?\brun ([a-z]+ --[^;\n]*)", script, re.MULTILINE)]
    assert {line.split()[0] for line in lines} == {"ttft", "decode", "compose", "prebuild", "memory"}
    commands = get_command(app).commands["bench"].commands  # type: ignore[attr-defined]
    for line in lines:
        name, *arguments = line.split()
        assert commands[name].make_context(name, [*arguments, "--device", "cpu", "--note", "quiet"])


def test_without_matplotlib_the_numbers_are_still_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    points = ["--lengths", "32", "--precisions", "float16,float32", "--repeats", "1", "--block-tokens", "8,16"]
    done = bench("compose", "--shape", "smoke", *points, "--output", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "pip install 'blockrag[plot]'" in done.stderr
    assert sorted(path.name for path in (tmp_path / "compose-smoke-cpu").iterdir()) == ["compose.json", "compose.md"]


def test_composing_counts_bytes_read_and_written(tmp_path: Path) -> None:
    points = ["--lengths", "64,200", "--repeats", "2", "--block-tokens", "8,16"]
    done = bench("compose", "--shape", "smoke", *points, "--output", str(tmp_path), "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (tmp_path / "compose-smoke-cpu" / "compose.png").exists()
    precisions = ComposeSettings().precisions
    assert [point["precision"] for point in result["points"][::3]] == list(precisions)
    for point in result["points"]:
        copied = point["seconds"].pop("copy")
        copy = 2 * point["cache_bytes"] / copied["median"]
        moved = point["bytes_at_rest"] + point["cache_bytes"]
        # 2 layers, 2 heads of 16, keys and values, float32.
        assert point["cache_bytes"] == point["tokens"] * 2 * 2 * 2 * 16 * 4
        for way, taken in point["seconds"].items():
            assert taken["n"] == 2
            assert point["share_of_copy"][way] == pytest.approx(moved / taken["median"] / copy)
    assert [(p["tokens"], p["blocks"]) for p in result["points"]][2] == (200, 2)


def test_decoding_gives_the_tokens_of_generate(tmp_path: Path) -> None:
    points = ["--lengths", "32,96", "--batch-lengths", "32", "--batch-sizes", "1,3", "--new-tokens", "6"]
    done = bench("decode", *SMOKE, *points, "--repeats", "2", "--output", str(tmp_path), "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (tmp_path / "decode-smoke-cpu" / "decode.png").exists()
    for point in result["points"]:
        assert point["same_tokens"] == 6
        assert point["ways"].keys() == {"blockrag", "transformers"}
        assert point["bound_tokens_per_s"] > 0
    assert [one["batch_size"] for one in result["batches"]] == [1, 3]
    assert result["batches"][0]["over_single"] == 1


def test_prebuilding_counts_every_way(tmp_path: Path) -> None:
    points = ["--passages", "5", "--budgets", "128,256", "--repeats", "2", "--to", "memory"]
    done = bench("prebuild", "--shape", "smoke", *points, "--output", str(tmp_path), "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert list(result["ways"]) == ["prebuild", "batched, 128 tokens", "batched, 256 tokens", "one by one"]
    assert result["passages"] == 5
    assert 5 * 20 <= result["tokens"] <= min(5 * 400, *result["padded_tokens"].values())
    for way in result["ways"].values():
        assert way["tokens_per_s"]["max"] == pytest.approx(result["tokens"] / way["seconds"]["min"])
    assert "one by one" in (tmp_path / "prebuild-smoke-cpu" / "prebuild.md").read_text("utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/clear_refs")
def test_memory_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = bench("memory", "--model", "demo", "--length", "1K", "--threads", "1", "--output", str(tmp_path), "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    steps = {one["step"]: one for one in result["steps"]}
    assert list(steps)[:2] == ["prebuild to disk", "compose from disk"]
    assert result["model"]["name"] == "demo"
    assert result["command"].startswith("blockrag bench memory --model demo --device cpu")
    for one in steps.values():
        assert one["over_cache"] == one["peak_bytes"] / result["cache_bytes"]
    # Of a cache as small as this one, a part finds room in pages that the process has already.
    assert steps["compose from memory"]["peak_bytes"] > 0.5 * result["cache_bytes"]


def test_the_measuring_process_says_why_it_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order = {
        "spec": asdict(SubjectSpec(shape="smoke", device="cpu")),
        "settings": asdict(MemorySettings(length=4096)),
        "threads": None,
        "note": "",
    }
    monkeypatch.setattr(sys, "stdin", StringIO(json.dumps(order)))
    bars = transformers_logging.is_progress_bar_enabled()
    memory._main()
    if bars:
        transformers_logging.enable_progress_bar()
    assert "the model can place 2048" in json.loads(capsys.readouterr().out)["refused"]


# -- the published way --------------------------------------------------------------------------------------------


def test_the_published_way_gives_the_logits_of_the_block_mask(make_model: Callable[..., BlockModel]) -> None:
    model = make_model("llama")
    prompt = prompt_of([7, 12, 1], 4)
    kvs = model.prefill([block.token_ids for block in prompt.local_blocks])
    assert model.profile is not None
    seed = SeedBlocks(model.model, model.profile, kvs)
    before = model.model.config._attn_implementation
    with stock_attention(model.model):
        assert model.model.config._attn_implementation == "sdpa"
        logits = [seed.first_logits(prompt.blocks[-1].token_ids, seed.compose()) for _ in range(2)]
    assert model.model.config._attn_implementation == before
    expected = model.reference_logits(prompt.blocks)[-1]
    for one in logits:
        assert float((one - expected).abs().max()) <= 1e-5


def test_the_published_way_is_refused_where_it_would_be_wrong(make_model: Callable[..., BlockModel]) -> None:
    model = make_model("cohere")
    assert model.profile is not None
    with pytest.raises(InputError, match="leave the mode 'seed' out"):
        SeedBlocks(model.model, model.profile, [])


# -- arithmetic ---------------------------------------------------------------------------------------------------


def test_a_store_that_loses_blocks_is_no_warm_store(make_model: Callable[..., BlockModel]) -> None:
    model, prompt = make_model("llama"), prompt_of([7, 12], 4)
    with pytest.raises(RuntimeError, match="0 tokens of 23 were reused, 19 expected"):
        composed(model, prompt, MemoryStore(), attention="block", reused=19)


def test_bounds_are_counted_work_at_measured_rates() -> None:
    subject = SubjectSpec(shape="smoke", device="cpu").load()
    work = Work.of(subject, [10, 20], 5, at_rest_bytes=1000)
    shape = model_shape(subject)
    assert work is not None
    assert shape is not None
    slow_memory = Rates(copy_bytes_per_s=1.0, matrix_flops_per_s=1e30)
    weights = 4 * shape.num_parameters
    assert work.full_s(slow_memory) == weights / 2
    assert work.warm_s(slow_memory) == (weights + 1000 + subject.cache_bytes(30)) / 2
    assert work.warm_s(slow_memory, at_rest_bytes=0) == (weights + subject.cache_bytes(30)) / 2
    assert work.query_s(slow_memory) == weights / 2
    slow_products = Rates(copy_bytes_per_s=1e30, matrix_flops_per_s=2.0)
    assert work.full_s(slow_products) == flops_to_first_token(num_tokens=35, shape=shape).with_attention / 2
    counted = flops_to_first_token(num_tokens=5, shape=shape, missed_blocks=[10, 20])
    assert work.cold_s(slow_products) == counted.with_reuse / 2
    uploading = Rates(copy_bytes_per_s=1e30, matrix_flops_per_s=1e30, upload_bytes_per_s=10.0)
    assert work.warm_s(uploading) == pytest.approx(100)
    assert uploading.best(slow_memory) == uploading


def test_passages_fill_the_prompt_exactly() -> None:
    generator = random.Random(0)
    for total in range(1, 400):
        lengths = cut(total, 8, 16, generator)
        assert sum(lengths) == total
        assert max(lengths) <= 16
        assert min(lengths) >= min(8, total)
    with pytest.raises(ValueError, match="cannot cut"):
        cut(100, 8, 15, generator)


def test_a_shorter_prompt_begins_like_a_longer_one(make_model: Callable[..., BlockModel]) -> None:
    model = make_model("llama")
    settings = PromptSettings(query_tokens=5, block_tokens=(8, 16), seed=3)
    short, long = (random_prompt(model, length, settings) for length in (200, 400))
    assert (short.num_tokens, long.num_tokens) == (200, 400)
    # All but the last two passages, whose lengths make the total come out.
    shared = len(short.local_blocks) - 2
    assert shared > 8
    assert short.local_blocks[:shared] == long.local_blocks[:shared]
    assert short.blocks[-1] == long.blocks[-1]
    control = {*model.tokenizer.all_special_ids, *model.stop_ids}
    assert control.isdisjoint(long.token_ids)
    other = random_prompt(model, 200, PromptSettings(query_tokens=5, block_tokens=(8, 16), seed=4))
    assert other.token_ids != short.token_ids


def test_ways_take_turns_in_a_rotating_order() -> None:
    ran: list[tuple[str, bool]] = []

    def run(way: str, counts: bool) -> float:
        ran.append((way, counts))
        return 6.0 if way == "slow" else 0.0

    said: list[str] = []
    take_turns(["a", "b", "slow"], run, repeats=2, once=["slow"], progress=said.append)
    assert ran == [("a", False), ("b", False), ("b", True), ("slow", True), ("a", True), ("a", True), ("b", True)]
    assert len(said) == 1


def test_samples_become_a_spread_a_slope_and_a_crossing() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"n": 3, "median": 2, "min": 1, "max": 3, "iqr": 1, "samples": [3.0, 1.0, 2.0]}
    assert spread([3.0])["iqr"] == 0
    assert slope([1, 2, 3], [5, 7, 9]) == pytest.approx(2)
    assert slope([1, 1], [5, 7]) is None
    # Equal on a logarithmic scale half way between 100 and 400.
    assert crossing([100, 400], [1, 2], [2, 1]) == pytest.approx(200)
    assert crossing([100, 400], [2, 2], [1, 1]) == 100
    assert crossing([100, 400], [2, 1], [1, 2]) is None
    # Ahead, behind, ahead again: what counts is the last time.
    assert crossing([1, 10, 100], [2, 1, 2], [1, 2, 1]) == pytest.approx(10**1.5)


def test_a_busy_machine_is_noticed() -> None:
    share = busy_share()
    assert share is None or 0 <= share <= 1
    assert busy_warning(None) is None
    assert busy_warning(0.05) is None
    assert "90% of this machine's processors" in str(busy_warning(0.9))


def test_a_file_systems_type_is_that_of_the_longest_mount_point() -> None:
    if Path("/proc/mounts").exists():
        assert filesystem_of(Path("/proc/self")) == "proc"


@pytest.mark.parametrize("command", ["", "ttft", "decode", "prebuild", "compose", "memory", "all"])
def test_help_fits_the_terminal(command: str) -> None:
    done = CliRunner().invoke(app, ["bench", *command.split(), "--help"], env={"COLUMNS": "80"}, prog_name="blockrag")
    assert done.exit_code == 0
    assert "130  interrupted" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ttft", "--lengths", "4"], "leaves no place"),
        (["ttft", "--lengths", "1,x"], "is no list of whole numbers"),
        (["ttft", "--block-tokens", "8,15"], "at least twice"),
        (["ttft", "--block-tokens", "8"], "two numbers"),
        (["ttft", "--modes", "full,fast"], "there is no mode 'fast'"),
        (["ttft", "--once", "kept"], "cannot run once"),
        (["ttft", "--modes", "device", "--device", "cpu", "--lengths", "96"], "needs --device cuda"),
        (["ttft", "--lengths", "4K"], "the model can place 2048"),
        (["ttft", "--shape", "huge"], "there is no shape 'huge'"),
        (["ttft", "--shape", "smoke", "--model", "demo"], "exclude each other"),
        (["ttft", "--precision", "int3"], "precision='int3'"),
        (["ttft", "--store", "ftp://somewhere"], "cannot open store"),
        (["decode", "--lengths", "5"], "leaves no passage"),
        (["decode", "--batch-sizes", "0"], "at least 1"),
        (["compose", "--precisions", "int3"], "there is no precision 'int3'"),
        (["prebuild", "--to", "tape"], "not to 'tape'"),
        (["prebuild", "--budgets", "0"], "at least 1"),
        (["memory", "--length", "5"], "must exceed"),
    ],
)
def test_impossible_arguments_are_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    if arguments[0] == "memory" and sys.platform != "linux":
        pytest.skip("peaks are measured on Linux only; elsewhere the command is refused before it reads the length")
    command, *rest = arguments
    shape = [] if "--shape" in rest else ["--shape", "smoke"]
    query = [] if command in ("compose", "prebuild") else ["--query-tokens", "5"]
    done = bench(command, *shape, *query, *rest, "--output", str(tmp_path))
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_defaults_are_the_papers_lengths_and_all_modes() -> None:
    assert TtftSettings().modes == MODES
    assert TtftSettings(lengths=(512, 50, 512)).lengths == (50, 512)
    assert DecodeSettings().batch_sizes == (1, 8)
    assert MemorySettings().prompts == PromptSettings()
