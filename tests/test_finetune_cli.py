"""`blockrag finetune` and `blockrag presets`: what they print, where, and how they end; the guide's commands run."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from tiny_models import CASES, tiny_model
from tiny_training import rag_line, rag_lines, save_tiny, write_data
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner, Result

from blockrag import BlockModel
from blockrag.cli import app, finetuning
from blockrag.finetune import plan as planning
from blockrag.finetune.adapters import with_adapters
from blockrag.finetune.loss import Reduction
from blockrag.finetune.rows import Order, Variants
from blockrag.finetune.settings import PRESETS, FinetuneSettings, Schedule
from blockrag.prompt import TEMPLATES

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "guide" / "fine-tuning.md"
LAUNCH_FILES = ROOT / "examples" / "finetune"
QUICK = ("--device", "cpu", "--accumulate", "1", "--log-steps", "1", "--warmup", "0")


@pytest.fixture(autouse=True, scope="module")
def _leave_transformers_as_it_was() -> Iterator[None]:
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    yield
    transformers_logging.set_verbosity(verbosity)
    if bars:
        transformers_logging.enable_progress_bar()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("finetune")
    save_tiny(directory / "model")
    write_data(directory / "train.jsonl", rag_lines(4))
    write_data(directory / "dev.jsonl", rag_lines(2))
    return directory


def begun(base: Path) -> tuple[object, ...]:
    """The command of `tuned`, without its steps."""
    return (
        *("finetune", base / "model", "--data", base / "train.jsonl", "--data", base / "more.jsonl"),
        *("--eval-data", base / "dev.jsonl", "--output", base / "tuned", "--preset", "cards", *QUICK),
        *("--learning-rate", "1e-3", "--betas", "0.9", "0.98", "--block-prefix", "[B]", "--save-steps", "1"),
    )


@pytest.fixture(scope="module")
def tuned(base: Path) -> Result:
    """A run of two steps, with both kinds of files repeated."""
    write_data(base / "more.jsonl", [rag_line(9)])
    return run(*begun(base), "--steps", "2", "--json")


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*arguments: object) -> str:
    """What a call says that must fail as a mistake; one line, on standard error."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


# -- Options and presets ------------------------------------------------------------------------------------------


def test_every_setting_is_an_option() -> None:
    options = inspect.signature(finetuning.finetune).parameters
    assert {field.name for field in fields(FinetuneSettings)} <= options.keys()


def test_what_can_be_chosen_is_what_the_library_has() -> None:
    assert [choice.value for choice in finetuning.Preset] == list(PRESETS)
    for choices, names in (
        (finetuning.Variants, Variants),
        (finetuning.Order, Order),
        (finetuning.Reduction, Reduction),
        (finetuning.Schedule, Schedule),
    ):
        assert [choice.value for choice in choices] == list(get_args(names))


def test_presets_are_shown_where_they_differ() -> None:
    lines = run("presets").stdout.splitlines()
    rates = next(line for line in lines if line.startswith("--learning-rate"))
    assert rates.split()[1:] == ["2e-05", "2e-06", "2e-05", "2e-06", "2e-05"]
    assert not any(line.startswith("--seed") for line in lines)
    found = json.loads(run("presets", "--json").stdout)
    assert found["paper"]["settings"] == PRESETS["paper"][1].to_dict()


# -- A run --------------------------------------------------------------------------------------------------------


def test_standard_output_gets_the_result_alone(base: Path, tuned: Result) -> None:
    assert tuned.exit_code == 0, tuned.output
    assert tuned.stdout.count("\n") == 1
    found = json.loads(tuned.stdout)
    assert found["path"] == str(base / "tuned")
    assert (found["steps"], found["samples"], found["skipped"]) == (2, 5, 0)
    (evaluation,) = found["evaluations"]
    assert evaluation["step"] == 2
    assert 0 <= evaluation["block_exact_match"] <= 100


def test_progress_is_lines_on_standard_error(tuned: Result) -> None:
    steps = re.compile(r"step [12] of 2: loss \d+\.\d{4}, learning rate \d\.\d\de-0\d, [\d,]+ tokens/s, \d+ s left")
    scores = r"\d+\.\d % \(loss \d+\.\d{3}\)"
    first, saved, second, evaluated, last = tuned.stderr.splitlines()
    assert steps.fullmatch(first)
    assert steps.fullmatch(second)
    assert re.fullmatch(f"step 2: exact match in full attention {scores}, block attention {scores}", evaluated)
    assert (saved, last) == ("step 1: checkpoint written", "step 2: checkpoint written")


def test_options_change_single_settings_of_the_preset(base: Path, tuned: Result) -> None:
    settings = json.loads((base / "tuned" / "train_log.json").read_text("utf-8"))["settings"]
    changed = {"learning_rate": 1e-3, "betas": [0.9, 0.98], "block_prefix": "[B]", "steps": 2, "accumulate": 1}
    assert {name: settings[name] for name in changed} == changed
    assert settings["reduction"] == PRESETS["cards"][1].reduction == "sum"


def test_verify_says_what_was_trained(base: Path, tuned: Result) -> None:
    found = json.loads(run("verify", base / "tuned", "--device", "cpu", "--json").stdout)
    facts = BlockModel.from_pretrained(base / "tuned", device="cpu").facts
    assert (found["block_fine_tuned"], found["block_prefix"]) == (True, "[B]")
    assert (found["max_trained_blocks"], found["max_trained_tokens"]) == (facts.max_blocks, facts.max_tokens)
    shown = run("verify", base / "tuned", "--device", "cpu").stdout
    assert f"yes, on up to {facts.max_blocks} blocks and {facts.max_tokens} positions" in " ".join(shown.split())


def test_a_run_goes_on_only_when_told_and_as_it_was_begun(base: Path, tuned: Result) -> None:
    again = (*begun(base), "--steps", "3")
    assert "pass --resume" in refused(*again)
    assert "begun with other learning_rate (was 0.001, is 0.002);" in refused(
        *again, "--resume", "--learning-rate", 2e-3
    )
    result = run(*again, "--resume")
    assert result.exit_code == 0, result.output
    longer, behind, last, *_ = result.stderr.splitlines()
    assert longer == "the run gets longer: 3 steps instead of 2"
    assert behind == "going on behind step 2 of 3"
    assert last.startswith("step 3 of 3: ")
    assert "3 steps over 5 samples" in " ".join(result.stdout.split())


def test_ctrl_c_keeps_the_last_checkpoint_and_says_how_to_go_on(base: Path, tmp_path: Path) -> None:
    command = ("finetune", base / "model", "--data", base / "train.jsonl", "--output", tmp_path / "out", *QUICK)
    options = ("--steps", "100000", "--save-steps", "2")
    with subprocess.Popen(
        [sys.executable, "-m", "blockrag", *map(str, (*command, *options))], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "checkpoint written" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130
    assert re.search(r"error: interrupted; checkpoint-\d+ is kept: add --resume to the same command", rest)
    assert "Traceback" not in rest
    assert not (tmp_path / "out" / "config.json").exists()


def test_other_processes_than_the_first_are_silent(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = ("finetune", base / "model", "--output", base / "other", "--dry-run", "--json", "--data")
    monkeypatch.setenv("RANK", "1")
    result, wrong = run(*call, base / "train.jsonl"), run(*call, base / "none.jsonl")
    assert (result.exit_code, result.output) == (0, "")
    assert (wrong.exit_code, wrong.output) == (2, "")


# -- Mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--learning-rate", "0"], "learning_rate=0"),
        (["--template", "tulu9"], "'tulu9' is neither a file nor one of tulu,"),
        (["--template", "train.jsonl"], "is not valid JSON"),
        (["--template", "list.json"], "holds list, no object"),
        (["--template", "odd.json"], "cannot have the keys ['colour']"),
        (["--deepspeed", "none.json"], "there is no file 'none.json'"),
        (["--max-tokens", "20"], "train.jsonl, line 1: "),
        (["--device", "gpu"], "device 'gpu' cannot be used"),
        (["--dtype", "float8"], "float8"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(
    base: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.chdir(base)
    Path("list.json").write_text("[1]", "utf-8")
    Path("odd.json").write_text('{"colour": "red"}', "utf-8")
    call = ["finetune", "model", "--data", "train.jsonl", "--output", "never", *QUICK, *options]
    assert said in refused(*call)
    assert not Path("never", "config.json").exists()


# -- Dry runs -----------------------------------------------------------------------------------------------------


def planned(base: Path, *options: object) -> Any:
    result = run(
        *("finetune", base / "model", "--data", base / "train.jsonl", "--output", base / "dry", "--dry-run"),
        *("--device", "cpu", "--json", *options),
    )
    assert result.exit_code == 0, result.output
    assert not (base / "dry").exists()
    return json.loads(result.stdout)


def test_a_dry_run_counts_what_would_be_trained(base: Path) -> None:
    found = planned(base, "--accumulate", "3")
    # Four lines of two questions, each in both attentions, a row each; eight rows are three steps of up to three.
    assert (found["samples"], found["questions"], found["rows"], found["steps"]) == (4, 8, 8, 3)
    assert found["tokens"] < found["tokens_apart"] < 2 * found["tokens"]
    assert found["saving"] == found["tokens_apart"] / found["tokens"]
    memory, parameters = found["memory"], found["parameters"]
    assert (memory["weights"], memory["gradients"], memory["optimizer"]) == (
        4 * parameters,
        4 * parameters,
        8 * parameters,
    )
    assert memory["total"] == sum(memory[part] for part in memory if part != "total")


def test_a_dry_run_knows_packing_processes_and_what_is_left_out(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned(base, "--pack", "--max-tokens", "4096")["rows"] == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert planned(base, "--accumulate", "2")["steps"] == 2
    longest = planned(base)["longest_row"]
    assert planned(base, "--max-tokens", str(longest - 20), "--skip-too-long")["longest_row"] <= longest - 20


def test_a_dry_run_counts_adapters(base: Path) -> None:
    found = planned(base, "--lora-rank", "4")
    # Width 32, keys and values 16, MLP 48, two layers: rank times inputs plus outputs.
    assert found["trained"] == 2 * 4 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 48) * 3)
    assert found["memory"]["gradients"] == 4 * found["trained"]


def test_a_dry_run_is_readable(base: Path) -> None:
    shown = " ".join(
        run(
            *("finetune", base / "model", "--data", base / "train.jsonl", "--output", base / "dry", "--dry-run"),
            *("--preset", "packed", "--device", "cpu"),
        ).stdout.split()
    )
    assert "4 samples with 8 questions" in shown
    assert "FSDP2 and ZeRO-3 share out weights" in shown


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("config", "model"), [(LlamaConfig, LlamaForCausalLM), (Qwen3Config, Qwen3ForCausalLM)], ids=["llama", "qwen3"]
)
def test_activations_are_about_what_the_backward_pass_keeps(config: Any, model: Any, bf16: bool) -> None:
    shape = config(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
    )
    built = model(shape).train()
    weights = {weight.untyped_storage().data_ptr() for weight in built.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    tokens = 256
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = built.model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    assert output is not None
    measured = sum(storage.nbytes() for storage in kept.values())
    estimated = 3 * planning._kept_numbers(shape) * tokens * (3 if bf16 else 4)
    assert estimated == pytest.approx(measured, rel=0.25)


# -- Adapters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_adapters_are_on_every_linear_layer_but_the_outputs(family: str) -> None:
    model = tiny_model(next(case for case in CASES if case.id == family))
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    adapted = with_adapters(model, FinetuneSettings(lora_rank=2))
    found = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for name, _ in adapted.named_modules()
        if name.endswith(".lora_A.default")
    }
    assert "lm_head" in linear
    assert found == linear - {"lm_head"}
    assert all("lora_" in name for name, weight in adapted.named_parameters() if weight.requires_grad)


# -- The guide and the launch files ---------------------------------------------------------------------------------


def guide_commands() -> list[list[str]]:
    """Each `blockrag finetune` of the guide, a launcher in front left out."""
    blocks = re.findall(r"```\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words[words.index("blockrag") + 1 :] for words in lines if "blockrag" in words and "finetune" in words]


def test_the_guide_has_commands() -> None:
    assert len(guide_commands()) >= 6


@pytest.mark.parametrize("words", guide_commands(), ids=lambda words: " ".join(words[1:4]).replace("/", "-"))
def test_the_guides_commands_run_in_tiny_form(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(base)
    words[1] = "model"
    words[words.index("--output") + 1] = str(tmp_path / "out")
    if "--deepspeed" in words:
        at = words.index("--deepspeed")
        assert (ROOT / words[at + 1]).is_file()
        del words[at : at + 2]
    result = run(*words, "--steps", "1", "--accumulate", "1", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "config.json").exists() is ("--dry-run" not in words)


@pytest.mark.parametrize("name", ["ddp.yaml", "fsdp2.yaml"])
def test_accelerate_reads_its_launch_files(name: str) -> None:
    config = load_config_from_file(str(LAUNCH_FILES / name))
    options = {action.dest for action in launch_command_parser()._actions}
    sharding = yaml.safe_load((LAUNCH_FILES / name).read_text("utf-8")).get("fsdp_config", {})
    assert config.num_processes == 8
    assert sharding.keys() <= options
    # What is gathered is what `finetune` reads back to write the directory.
    assert name == "ddp.yaml" or sharding["fsdp_state_dict_type"] == "FULL_STATE_DICT"


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_files_leave_the_run_to_its_options(stage: int) -> None:
    config = json.loads((LAUNCH_FILES / f"zero{stage}.json").read_text("utf-8"))
    assert config["zero_optimization"]["stage"] == stage
    assert stage == 2 or config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    assert config["bf16"] == {"enabled": "auto"}
    for name in ("gradient_accumulation_steps", "gradient_clipping", "train_micro_batch_size_per_gpu"):
        assert config[name] == "auto"


def test_a_template_can_come_from_a_model(base: Path, tuned: Result, tmp_path: Path) -> None:
    facts = base / "tuned" / "block_attention.json"
    result = run(
        *(
            "finetune",
            base / "model",
            "--data",
            base / "train.jsonl",
            "--output",
            tmp_path / "out",
            "--template",
            facts,
        ),
        *(*QUICK, "--steps", "1"),
    )
    assert result.exit_code == 0, result.output
    assert BlockModel.from_pretrained(tmp_path / "out", device="cpu").template.name in TEMPLATES
