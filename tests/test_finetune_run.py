"""`finetune`: from files to a directory that loads, says what it is, and is there whole or not at all."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_finetune_exact import PREFIXED_PLAIN
from tiny_tokenizers import plain_tokenizer
from tiny_training import PREFIXED, rag_line, rag_lines, save_tiny, write_data
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaMLP

from blockrag.errors import BlockRAGError, DataError, InputError, MissingDependencyError
from blockrag.finetune import saving
from blockrag.finetune.facts import training_template
from blockrag.finetune.run import Finetuned, finetune
from blockrag.finetune.settings import PRESETS, FinetuneSettings
from blockrag.model.block_model import BlockModel
from blockrag.model.facts import BlockAttentionFacts, NotBlockFineTunedWarning, load_facts
from blockrag.passage import Passage
from blockrag.prompt import TEMPLATES, PromptTemplate

QUICK = FinetuneSettings(steps=2, batch_rows=2, learning_rate=1e-3, log_steps=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    save_tiny(directory / "model")
    write_data(directory / "train.jsonl", rag_lines(4))
    write_data(directory / "eval.jsonl", rag_lines(2))
    return directory


@pytest.fixture(scope="module")
def tuned(base: Path) -> Finetuned:
    """A plain run with evaluation, from a checkpoint in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(base / "model").to(torch.bfloat16)
    model.save_pretrained(base / "bf16")
    plain_tokenizer().save_pretrained(base / "bf16")
    return run(base, "tuned", replace(QUICK, max_gap=40), model=base / "bf16", eval_data=[base / "eval.jsonl"])


def run(base: Path, name: str, settings: FinetuneSettings = QUICK, **arguments: Any) -> Finetuned:
    model = arguments.pop("model", base / "model")
    data = arguments.pop("data", [base / "train.jsonl"])
    return finetune(model, data, base / name, settings, device="cpu", **arguments)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def apart(one: Path, other: Path) -> float:
    """The largest difference between two models."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return max(float((first[name].float() - second[name].float()).abs().max()) for name in first)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 40)[None]).logits


# -- What is left -------------------------------------------------------------------------------------------------


def test_it_loads_with_plain_transformers(tuned: Finetuned) -> None:
    model = AutoModelForCausalLM.from_pretrained(tuned.path)
    tokenizer = AutoTokenizer.from_pretrained(tuned.path)
    assert tokenizer("The river")["input_ids"] == plain_tokenizer()("The river")["input_ids"]
    assert bool(logits_of(model).isfinite().all())
    assert model.generation_config.eos_token_id == 2


def test_it_keeps_the_precision_of_its_checkpoint_unless_told(base: Path, tuned: Finetuned) -> None:
    assert {tensor.dtype for tensor in weights(tuned.path).values()} == {torch.bfloat16}
    assert json.loads((tuned.path / "config.json").read_text())["dtype"] == "bfloat16"
    half = run(base, "half", save_dtype="bfloat16").path
    usual = run(base, "usual").path
    assert {tensor.dtype for tensor in weights(half).values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in weights(usual).values()} == {torch.float32}
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in weights(usual).items()}
    assert all(torch.equal(tensor, rounded[name]) for name, tensor in weights(half).items())


def test_block_attention_sends_the_prefix_it_was_trained_with(tuned: Finetuned) -> None:
    """And does not warn: the facts say that it is block-fine-tuned. Full attention leaves the prefix out."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotBlockFineTunedWarning)
        model = BlockModel.from_pretrained(tuned.path)
    assert model.template == replace(TEMPLATES["plain"], block_attention_prefix=PREFIXED)
    prompt = model.template.segment(model.tokenizer, passages=[Passage(id="1", text="The sea.")], question="Who?")
    assert model.tokenizer.decode(prompt.blocks[0].token_ids).startswith(f"<bos>{PREFIXED}Answer")
    assert PREFIXED in prompt.text
    assert PREFIXED not in prompt.as_full().text
    assert PREFIXED not in model.tokenizer.decode(prompt.as_full().token_ids)


def test_facts_are_right_by_hand_count(base: Path) -> None:
    """Prefix and passages are the blocks; most positions are those of the longest sample."""
    tokenizer = plain_tokenizer()
    longest = rag_line(3, passages=5, questions=1)
    data = write_data(base / "counted.jsonl", [rag_line(1, passages=1, questions=3), longest])
    facts = load_facts(run(base, "counted", replace(QUICK, steps=1), data=[data]).path / "block_attention.json")
    assert facts.block_fine_tuned is True
    assert facts.max_blocks == 6
    passages = [one.passage for one in longest.passages]
    prompt = PREFIXED_PLAIN.segment(tokenizer, passages=passages, question=longest.questions[0].question)
    answer = tokenizer(" " + longest.questions[0].target)["input_ids"]
    assert facts.max_tokens == prompt.num_tokens + len(answer) + 1


def test_log_and_card_say_what_was_done(base: Path, tuned: Finetuned) -> None:
    log = json.loads((tuned.path / "train_log.json").read_text())
    assert (log["steps"], log["samples"], log["rows"], log["skipped"]) == (2, 4, 8, 0) == (tuned.steps, 4, 8, 0)
    assert log["settings"] == json.loads(json.dumps(replace(QUICK, max_gap=40).to_dict()))
    assert log["base"] == "bf16"
    assert log["parameters"] == sum(tensor.numel() for tensor in weights(base / "model").values())
    assert [(file["name"], file["lines"]) for file in log["data"]] == [("train.jsonl", 4)]
    assert re.fullmatch("[0-9a-f]{64}", log["eval_data"][0]["sha256"])
    assert log["history"] == json.loads(json.dumps(tuned.history))
    assert [entry["step"] for entry in tuned.history if "loss" in entry] == [1, 2]
    (evaluated,) = [entry for entry in tuned.history if "eval_full_loss" in entry]
    assert {
        f"eval_{mode}_exact_match_{kind}" for mode in ("full", "block") for kind in ("k0", "k1")
    } <= evaluated.keys()
    assert evaluated["eval_full_loss"] != evaluated["eval_block_loss"]
    card = (tuned.path / "README.md").read_text()
    facts = load_facts(tuned.path / "block_attention.json")
    for expected in (
        f"# {tuned.path.name}",
        "bf16, fine-tuned with blockrag",
        f"`{PREFIXED}`",
        f"{facts.max_blocks} blocks and {facts.max_tokens} positions",
        f"train.jsonl: 4 lines, SHA-256 {log['data'][0]['sha256']}",
        f"4 samples, {log['tokens_seen']:,} tokens seen in 2 steps",
        "| learning_rate | 0.001 |",
        f"| 2 | {evaluated['eval_full_exact_match']:.1f} | {evaluated['eval_block_exact_match']:.1f} |",
    ):
        assert expected in card
    # Nothing says where it lay.
    for path in tuned.path.glob("*.*"):
        if path.suffix != ".safetensors" and path.is_file():
            assert str(base).encode() not in path.read_bytes(), path.name


def test_the_plot_shows_something(tuned: Finetuned) -> None:
    """A PNG of both panels, with more on it than its background."""
    data = (tuned.path / "train.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert width > 2 * height > 400
    pixels, at = b"", 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        pixels += data[at + 8 : at + 8 + length] if data[at + 4 : at + 8] == b"IDAT" else b""
        at += length + 12
    assert len(set(zlib.decompress(pixels))) > 50


def test_a_whole_run_in_full_attention_claims_nothing(base: Path) -> None:
    control = run(base, "control", replace(QUICK, steps=1, variants="full"))
    facts = load_facts(control.path / "block_attention.json")
    assert facts.block_fine_tuned is False
    card = (control.path / "README.md").read_text("utf-8")
    assert "in full attention alone" in card
    assert "Block-Attention" not in card
    assert facts.template == TEMPLATES["plain"]
    # What was block-fine-tuned before stays so, with its prefix.
    block = run(base, "block", replace(QUICK, steps=1, variants="block", block_prefix="[B]"))
    again = run(base, "again", replace(QUICK, steps=1, variants="full"), model=block.path)
    assert load_facts(again.path / "block_attention.json") == load_facts(block.path / "block_attention.json")
    further = run(base, "further", replace(QUICK, steps=1, variants="both"), model=block.path)
    template = load_facts(further.path / "block_attention.json").template
    assert template is not None
    assert template.block_attention_prefix == "[B]"


@pytest.mark.parametrize(
    ("given", "known", "expected"),
    [
        (None, None, "[Block-Attention]"),
        (None, "[B]", "[B]"),
        (None, "", ""),
        ("", "[B]", "[B]"),
        ("[Mine]", None, "[Mine]"),
        ("[Mine]", "[B]", "[Mine]"),
        ("", None, "[Block-Attention]"),
    ],
)
def test_which_prefix_is_trained(given: str | None, known: str | None, expected: str) -> None:
    """The given template's if it has one, else the model's if it was block-fine-tuned, else the published one."""

    def template(prefix: str | None) -> PromptTemplate | None:
        return None if prefix is None else replace(TEMPLATES["plain"], block_attention_prefix=prefix)

    facts = BlockAttentionFacts(block_fine_tuned=known is not None or None, template=template(known))
    found = training_template(template(given), facts, plain_tokenizer(), QUICK)
    assert found.block_attention_prefix == expected
    said = training_template(template(given), facts, plain_tokenizer(), replace(QUICK, block_prefix="[Said]"))
    assert said.block_attention_prefix == "[Said]"


def test_every_checkpoint_is_a_model(base: Path) -> None:
    done = run(base, "kept", replace(QUICK, steps=4, save_steps=1, save_limit=2))
    found = sorted(path.name for path in (done.path / "checkpoints").iterdir())
    assert found == ["checkpoint-3", "checkpoint-4", "run.json"]
    model = BlockModel.from_pretrained(done.path / "checkpoints" / "checkpoint-3")
    assert model.facts == load_facts(done.path / "block_attention.json")
    assert apart(done.path, done.path / "checkpoints" / "checkpoint-4") == 0
    assert apart(done.path, done.path / "checkpoints" / "checkpoint-3") > 0


# -- How a batch is cut -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_accumulation_changes_nothing(base: Path, reduction: str) -> None:
    """One forward of four rows, two of two, four of one; rows of different lengths and numbers of answers."""
    data = write_data(base / f"uneven-{reduction}.jsonl", [rag_line(n, questions=1 + n % 4) for n in range(8)])
    settings = replace(QUICK, learning_rate=1e-4, variants="alternate", order="file", reduction=reduction, max_gap=30)
    found = [
        run(base, f"{reduction}-{rows}", replace(settings, batch_rows=rows, accumulate=4 // rows), data=[data])
        for rows in (4, 2, 1)
    ]
    for other in found[1:]:
        assert apart(found[0].path, other.path) <= 1e-6
        for one, same in zip(found[0].history[:2], other.history[:2], strict=True):
            # Adam hides the scale of a gradient, its norm does not.
            assert (same["loss"], same["grad_norm"]) == pytest.approx((one["loss"], one["grad_norm"]), rel=1e-5)
    assert apart(base / "model", found[0].path) > 1e-4


def test_packed_rows_train_as_rows_of_their_own(base: Path) -> None:
    """The same samples in one step, each in a row, or behind each other."""
    settings = replace(QUICK, steps=1, learning_rate=1e-4, batch_rows=8, variants="both", reduction="sum")
    alone = run(base, "unpacked", settings)
    packed = run(base, "packed", replace(settings, pack=True))
    assert json.loads((packed.path / "train_log.json").read_text())["rows"] == 1
    assert apart(alone.path, packed.path) <= 1e-6
    assert packed.history[0]["grad_norm"] == pytest.approx(alone.history[0]["grad_norm"], rel=1e-5)


def test_gradient_checkpointing_changes_nothing_and_bfloat16_little(base: Path) -> None:
    usual = run(base, "plain")
    again = run(base, "recomputed", replace(QUICK, gradient_checkpointing=True))
    assert apart(usual.path, again.path) <= 1e-6
    rounded = run(base, "autocast", replace(QUICK, bf16=True))
    assert rounded.history[0]["loss"] == pytest.approx(usual.history[0]["loss"], rel=2e-2)
    assert rounded.history[0]["loss"] != usual.history[0]["loss"]
    assert {tensor.dtype for tensor in weights(rounded.path).values()} == {torch.float32}


@pytest.mark.parametrize(("recomputed", "calls"), [(False, 2), (True, 4)])
def test_gradient_checkpointing_recomputes(base: Path, recomputed: bool, calls: int) -> None:
    """Both layers run twice for one backward; else the setting does nothing."""
    called: list[object] = []

    def count(module: torch.nn.Module, arguments: object) -> None:
        if isinstance(module, LlamaMLP):
            called.append(module)

    # In front of the forward: a recomputation ends as soon as it has what it needs, by an exception.
    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        run(base, f"calls-{calls}", replace(QUICK, steps=1, gradient_checkpointing=recomputed))
    finally:
        hook.remove()
    assert len(called) == calls


# -- Adapters -----------------------------------------------------------------------------------------------------


# Loading with peft, as users may, asks for an attribute that transformers has renamed; training must not say so.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_merged_adapters_equal_loaded_ones(base: Path) -> None:
    from peft import PeftModel

    done = run(base, "lora", replace(QUICK, steps=3, lora_rank=4, lora_alpha=64, learning_rate=1e-2))
    untouched = AutoModelForCausalLM.from_pretrained(base / "model")
    before = logits_of(untouched)
    merged = logits_of(AutoModelForCausalLM.from_pretrained(done.path))
    loaded = logits_of(PeftModel.from_pretrained(untouched, str(done.path / "adapter")))
    assert (merged - loaded).abs().max() <= 1e-5
    assert (merged - before).abs().max() > 1e-2
    # Attention and MLP of both layers, and neither the embeddings nor the head.
    first, second = weights(base / "model"), weights(done.path)
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed == {name for name in first if "_proj" in name}


def test_adapters_can_be_trained_by_muon(base: Path) -> None:
    """They are matrices alone; nothing is left for AdamW."""
    done = run(base, "muon-lora", replace(QUICK, lora_rank=2, optimizer="muon"))
    assert apart(base / "model", done.path) > 0


def test_full_fine_tuning_leaves_no_adapter(tuned: Finetuned) -> None:
    assert not (tuned.path / "adapter").exists()


# -- Failures while saving ----------------------------------------------------------------------------------------


def _raise(*arguments: object, **named: object) -> None:
    raise OSError("No space left on device")


FAILURES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "weights": lambda patch: patch.setattr("transformers.LlamaForCausalLM.save_pretrained", _raise),
    "tokenizer": lambda patch: patch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", _raise),
    "facts": lambda patch: patch.setattr(saving, "save_facts", _raise),
    "card": lambda patch: patch.setattr(saving, "_card", _raise),
    "plot": lambda patch: patch.setattr(saving, "plot_history", _raise),
}


@pytest.mark.parametrize("place", FAILURES)
def test_a_directory_that_could_not_be_written_is_no_model(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    FAILURES[place](monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        finetune(base / "model", [base / "train.jsonl"], tmp_path / "out", replace(QUICK, steps=1), device="cpu")
    assert not list((tmp_path / "out").rglob("config.json"))
    assert not (tmp_path / "out" / ".partial").exists()


def test_any_move_may_fail(base: Path, tuned: Finetuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over an earlier model: whichever move is the last, the directory is the old model, the new one, or none."""
    facts, log = (
        load_facts(tuned.path / "block_attention.json"),
        json.loads((tuned.path / "train_log.json").read_text()),
    )
    new = load_file(base / "model" / "model.safetensors")

    def write(directory: Path) -> None:
        save_file(new, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text((base / "model" / "config.json").read_text())

    moves, limit = [0], [10**6]
    usual, tokenizer, out = Path.replace, plain_tokenizer(), tmp_path / "out"

    def limited(self: Path, target: Path) -> Path:
        moves[0] += 1
        if moves[0] > limit[0]:
            _raise()
        return usual(self, target)

    def save(name: str, allowed: int = 10**6) -> None:
        moves[0], limit[0] = 0, allowed
        saving.save_finetuned(out, write, tokenizer, facts, {**log, "name": name})

    monkeypatch.setattr(Path, "replace", limited)
    save("old")
    for allowed in range(moves[0]):
        with pytest.raises(OSError, match="No space left"):
            save("new", allowed)
        assert not (out / "config.json").exists()
        assert not (out / ".partial").exists()
        # What comes next makes it whole again.
        save("newer")
        assert "# newer" in (out / "README.md").read_text()
        assert (out / "config.json").is_file()
    assert allowed >= 5
    assert bool(logits_of(AutoModelForCausalLM.from_pretrained(out)).isfinite().all())


def test_weights_of_an_earlier_run_do_not_stay_beside_others(base: Path, tmp_path: Path) -> None:
    """Cut into two files where they were one: transformers would load the one."""
    facts = load_facts(run(base, "facts").path / "block_attention.json")
    log = json.loads((base / "facts" / "train_log.json").read_text("utf-8"))
    models = [AutoModelForCausalLM.from_pretrained(base / name) for name in ("model", "facts")]
    for model, size in zip(models, ("1GB", "60KB"), strict=True):
        saving.save_finetuned(
            tmp_path / "out",
            lambda at, model=model, size=size: model.save_pretrained(at, max_shard_size=size),
            plain_tokenizer(),
            facts,
            log,
        )
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(found), logits_of(models[1]))
    assert not torch.equal(logits_of(found), logits_of(models[0]))


# -- Refusals -----------------------------------------------------------------------------------------------------


def test_nothing_is_written_where_a_line_cannot_be_used(base: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"blocks": ["a", "b"], "response": "c"}\n{"text": "?"}\n')
    long = write_data(tmp_path / "long.jsonl", [rag_line(1, passages=20)])
    small = Path(shutil.copytree(base / "model", tmp_path / "small"))
    config = json.loads((small / "config.json").read_text("utf-8"))
    (small / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}), "utf-8")
    cases: list[tuple[type[BlockRAGError], str, dict[str, Any]]] = [
        (DataError, r"bad\.jsonl, line 2: has the fields", {"data": [bad]}),
        (DataError, r"bad\.jsonl, line 2: has the fields", {"eval_data": [bad]}),
        (DataError, r"long\.jsonl, line 1: \d+ tokens with 21 blocks, more than 256", {"data": [long]}),
        (
            DataError,
            r"long\.jsonl, line 1: 4\d\d tokens with 21 blocks, more than the 256 positions the model was made for",
            {"data": [long], "model": small, "settings": QUICK},
        ),
        (
            DataError,
            r"no line of .*long\.jsonl can be scored",
            {"eval_data": [long], "model": small, "settings": QUICK},
        ),
        (DataError, "no sample to train on", {"data": [long], "too_long": "skip"}),
        (DataError, r"no line of .*long\.jsonl can be scored, all are longer than 256 tokens", {"eval_data": [long]}),
        (DataError, "cannot read", {"data": [tmp_path / "absent.jsonl"]}),
        (InputError, "cannot load a causal language model", {"model": tmp_path / "absent"}),
        (InputError, "no checkpoint in", {"resume": True}),
        (InputError, "names no|cannot be used", {"device": "cuda:7"}),
    ]
    for error, message, changed in cases:
        arguments = {"model": base / "model", "data": [base / "train.jsonl"], "device": "cpu"} | changed
        arguments.setdefault("settings", replace(QUICK, max_tokens=256))
        with pytest.raises(error, match=message):
            finetune(out=tmp_path / "out", **arguments)
        assert not (tmp_path / "out").exists()


def test_what_is_too_long_is_left_out_and_counted(base: Path) -> None:
    data = write_data(base / "mixed.jsonl", [rag_line(1, passages=20), rag_line(2), rag_line(3)])
    done = run(base, "mixed", replace(QUICK, steps=1, max_tokens=256), data=[data], too_long="skip")
    assert (done.samples, done.skipped) == (2, 1)


def test_a_run_is_not_written_over(base: Path, tuned: Finetuned) -> None:
    before = {path: path.stat().st_mtime_ns for path in tuned.path.rglob("*")}
    with pytest.raises(InputError, match=f"'{re.escape(str(tuned.path))}' holds a run already; pass --resume"):
        run(base, tuned.path.name)
    assert {path: path.stat().st_mtime_ns for path in tuned.path.rglob("*")} == before
    (base / "file").write_text("")
    with pytest.raises(InputError, match="is a file; pass a directory"):
        run(base, "file")


def test_a_checkpoint_that_was_cut_off_is_not_gone_on_from(base: Path) -> None:
    done = run(base, "cut", replace(QUICK, steps=2, save_steps=1))
    checkpoints = done.path / "checkpoints"
    state = (checkpoints / "checkpoint-2" / "trainer_state.json").read_text()
    (checkpoints / "checkpoint-2" / "trainer_state.json").write_text(state[: len(state) // 2])
    again = run(base, "cut", replace(QUICK, steps=2, save_steps=1), resume=True)
    assert again.steps == 2
    for name in ("checkpoint-1", "checkpoint-2"):
        (checkpoints / name / "trainer_state.json").unlink()
    with pytest.raises(InputError, match="no checkpoint in"):
        run(base, "cut", resume=True)


@pytest.mark.parametrize(("package", "rank"), [("accelerate", 0), ("peft", 2)])
def test_what_is_not_installed_is_named(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, rank: int
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"needs {package}; run: pip install 'blockrag\[finetune\]'"):
        finetune(base / "model", [base / "train.jsonl"], tmp_path / "out", replace(QUICK, lora_rank=rank), device="cpu")
    assert not (tmp_path / "out" / "config.json").exists()


def test_muon_is_refused_where_matrices_are_cut(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what `accelerate launch` sets for FSDP; a variable that says no says nothing."""
    muon = replace(QUICK, steps=1, optimizer="muon")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match=r"optimizer='muon' needs whole matrices.*use 'adamw' there"):
        finetune(base / "model", [base / "train.jsonl"], tmp_path / "out", muon, device="cpu")
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert finetune(base / "model", [base / "train.jsonl"], tmp_path / "out", muon, device="cpu").steps == 1


@pytest.mark.parametrize(("steps", "log_steps", "save_steps"), [(3, 1, 0), (3, 50, 0), (3, 50, 2)])
def test_a_run_that_diverges_stops_and_saves_nothing(
    base: Path, tmp_path: Path, steps: int, log_steps: int, save_steps: int
) -> None:
    """However rarely it is logged: what is saved was looked at first."""
    settings = replace(QUICK, steps=steps, log_steps=log_steps, save_steps=save_steps, learning_rate=1e30, warmup=0)
    with pytest.raises(InputError, match=r"is (nan|inf) at step [123]: the run has diverged; lower --learning-rate"):
        finetune(base / "model", [base / "train.jsonl"], tmp_path / "out", settings, device="cpu")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_infinite_weights_stop_at_once(base: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base / "model")
    with torch.no_grad():
        model.lm_head.weight[5] = float("inf")
    model.save_pretrained(tmp_path / "model")
    plain_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="at step 1: the run has diverged"):
        finetune(tmp_path / "model", [base / "train.jsonl"], tmp_path / "out", QUICK, device="cpu")


# -- Settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": "some"}, "variants='some' is none of 'both', 'alternate', 'block', 'full'"),
        ({"reduction": "max"}, "reduction='max' is none of"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"max_gap": -1}, "max_gap=-1 must be at least 0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"prompt_weight": 1.5}, "prompt_weight=1.5"),
        ({"decay": 0.0}, "decay=0.0"),
        ({"learning_rate": math.nan}, "learning_rate=nan must be a finite number"),
        ({"epochs": math.inf}, "epochs=inf must be a finite number"),
        ({"warmup": math.nan}, "warmup=nan must be a finite number"),
        ({"betas": (0.9, 1.0)}, "betas=(0.9, 1.0)"),
        ({"betas": (math.nan, 0.9)}, "betas=(nan, 0.9)"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0 must be at least 0"),
        ({"lora_alpha": 0}, "lora_alpha=0 must be at least 1"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        FinetuneSettings(**changes)


def test_a_warm_up_that_takes_the_whole_run_is_said(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "blockrag"):
        run(base, "cold", replace(QUICK, warmup=3))
        assert "the warm-up of 3 steps takes the whole run of 2" in caplog.text
        caplog.clear()
        run(base, "warm", replace(QUICK, warmup=1))
        assert not caplog.text


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs(base: Path, name: str) -> None:
    about, settings = PRESETS[name]
    assert len(about) > 40
    quick = replace(settings, steps=1, accumulate=min(2, settings.accumulate), batch_rows=1)
    assert run(base, f"preset-{name}", quick).steps == 1


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.0, 5.0, 10.0, 10.0, 10.0, 10.0]),
        ("linear", [0.0, 5.0, 10.0, 7.5, 5.0, 2.5]),
        ("hold-then-linear", [0.2, 5.1, 10.0, 10.0, 10.0, 5.1]),
    ],
)
def test_schedules(base: Path, schedule: str, expected: list[float]) -> None:
    """Two steps of warm-up, then as the name says; "hold-then-linear" begins and ends at a fiftieth."""
    done = run(base, f"schedule-{schedule}", replace(QUICK, steps=6, warmup=2, schedule=schedule, decay=1 / 3))
    rates = [entry["learning_rate"] * 1e4 for entry in done.history if "loss" in entry]
    assert rates == pytest.approx(expected, abs=1e-6)
