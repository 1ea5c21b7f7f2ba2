"""Weights are known by their content, and by their files' identity only where that says the same."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_models import CASES, tiny_model
from tiny_tokenizers import plain_tokenizer

from blockrag.kernels.build import library
from blockrag.model import weights as weights_module
from blockrag.model.block_model import BlockModel
from blockrag.model.facts import BlockAttentionFacts
from blockrag.model.identity import weights_factor

FINE_TUNED = BlockAttentionFacts(block_fine_tuned=True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the cache; files count as settled at once, but that has a test of its own."""
    # The compiled kernels stay where they are.
    library()
    directory = tmp_path / "cache"
    monkeypatch.setenv("BLOCKRAG_CACHE_DIR", str(directory))
    monkeypatch.setattr(weights_module, "_SETTLED_NS", 0)
    return directory / "weights.json"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The digests of whole reads, in order."""
    found: list[str] = []

    def counting(model: Any) -> str:
        found.append(weights_factor(model))
        return found[-1]

    # Both places that read whole: the load, and the fingerprint of a model whose digest is not known.
    monkeypatch.setattr("blockrag.model.weights.weights_factor", counting)
    monkeypatch.setattr("blockrag.model.identity.weights_factor", counting)
    return found


def save(path: Path, change: Callable[[Any], None] | None = None, **arguments: Any) -> Path:
    model = tiny_model(CASES[0])
    if change is not None:
        with torch.no_grad():
            change(model)
    model.save_pretrained(path, **arguments)
    plain_tokenizer().save_pretrained(path)
    return path


def load(path: Path, **arguments: Any) -> BlockModel:
    return BlockModel.from_pretrained(path, block_fine_tuned=True, device="cpu", kept_bytes=0, **arguments)


def bump(model: Any) -> None:
    model.base_model.layers[2].mlp.up_proj.weight[3, 5] += 0.5


@pytest.mark.parametrize("shards", [1, 4])
def test_the_second_load_reads_no_weights_for_their_digest(
    tmp_path: Path, cache: Path, reads: list[str], shards: int
) -> None:
    path = save(tmp_path / "model", max_shard_size="150KB" if shards > 1 else "1GB")
    assert len(list(path.glob("*.safetensors"))) >= shards
    first = load(path).fingerprint
    assert (len(reads), first.weights) == (1, reads[0])
    second = load(path).fingerprint
    assert second == first
    assert len(reads) == 1
    assert second.weights == weights_factor(tiny_model(CASES[0])), "what reading everything gives"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o600
    assert [file.name for file in cache.parent.iterdir() if not file.name.startswith("kernels")] == ["weights.json"]


def test_rewritten_weights_are_others_though_size_and_mtime_are_restored(
    tmp_path: Path, cache: Path, reads: list[str]
) -> None:
    path = save(tmp_path / "model")
    file = path / "model.safetensors"
    before, found = load(path).fingerprint, file.stat()
    content = bytearray(file.read_bytes())
    # The last element: none of the sampled bytes is needed to notice.
    content[-6] ^= 0x40
    with file.open("r+b") as opened:
        opened.write(content)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    again = file.stat()
    assert (again.st_ino, again.st_size, again.st_mtime_ns) == (found.st_ino, found.st_size, found.st_mtime_ns)
    after = load(path).fingerprint
    assert after.differences(before) == ("weights",)
    assert len(reads) == 2


@pytest.mark.parametrize("how", ["dtype", "copy", "config", "touch"])
def test_whatever_may_change_the_weights_is_another_identity(
    tmp_path: Path, cache: Path, reads: list[str], how: str
) -> None:
    path = save(tmp_path / "model")
    before = load(path).fingerprint
    arguments: dict[str, Any] = {}
    if how == "dtype":
        arguments["dtype"] = "bfloat16"
    elif how == "copy":
        path = Path(shutil.copytree(path, tmp_path / "copy"))
    elif how == "config":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    else:
        (path / "model.safetensors").touch()
    after = load(path, **arguments).fingerprint
    assert len(reads) == 2
    assert (after.weights == before.weights) == (how != "dtype")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"format": 2, "entries": {}}',
        b'{"format": 1, "entries": {"x": {}}}',
        b'{"format": 1, "entries": 3}',
        b'{"format": 1, "entries": {"%s": {"weights": "%s"}}}' % (b"0" * 32, b"0" * 32),
    ],
    ids=["empty", "cut", "list", "no text", "deep", "later format", "bad key", "no entries", "lacks the sample"],
)
def test_a_damaged_cache_is_written_anew(tmp_path: Path, cache: Path, reads: list[str], content: bytes) -> None:
    path = save(tmp_path / "model")
    expected = load(path).fingerprint
    cache.write_bytes(content)
    assert load(path).fingerprint == expected
    assert len(reads) == 2
    assert load(path).fingerprint == expected
    assert len(reads) == 2, "it has been mended"


@pytest.mark.parametrize("how", ["others may write", "link", "directory"])
def test_a_cache_that_others_may_have_written_is_not_believed(
    tmp_path: Path, cache: Path, reads: list[str], how: str
) -> None:
    path = save(tmp_path / "model")
    expected = load(path).fingerprint
    forged = json.loads(cache.read_text())
    for entry in forged["entries"].values():
        entry["weights"] = "0" * 32
    cache.write_text(json.dumps(forged))
    assert load(path).fingerprint.weights == "0" * 32, "the control: one's own file is believed"
    if how == "others may write":
        cache.chmod(0o666)
    elif how == "link":
        cache.rename(tmp_path / "elsewhere.json")
        cache.symlink_to(tmp_path / "elsewhere.json")
    else:
        cache.parent.chmod(0o777)
    assert load(path).fingerprint == expected


def test_a_directory_that_cannot_be_written_costs_only_time(
    tmp_path: Path, cache: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "model")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BLOCKRAG_CACHE_DIR", str(tmp_path / "file"))
    assert load(path).fingerprint == load(path).fingerprint
    assert len(reads) == 2


def test_a_sample_that_differs_is_believed_before_the_files(tmp_path: Path, cache: Path, reads: list[str]) -> None:
    """As where a network file system shows old times."""
    path = save(tmp_path / "model")
    expected = load(path).fingerprint
    content = json.loads(cache.read_text())
    for entry in content["entries"].values():
        entry |= {"sample": "0" * 32, "weights": "0" * 32}
    cache.write_text(json.dumps(content))
    assert load(path).fingerprint == expected
    assert len(reads) == 2


def test_files_that_have_just_changed_are_not_remembered(
    tmp_path: Path, cache: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They could change again without their times changing."""
    monkeypatch.setattr(weights_module, "_SETTLED_NS", 3600 * 10**9)
    path = save(tmp_path / "model")
    assert load(path).fingerprint == load(path).fingerprint
    assert len(reads) == 2
    assert not cache.exists()


@pytest.mark.parametrize("how", ["in place", "past autograd", "replaced"])
def test_a_model_that_was_changed_after_loading_is_read(
    tmp_path: Path, cache: Path, reads: list[str], how: str
) -> None:
    path = save(tmp_path / "model")
    before = load(path).fingerprint
    model = load(path)
    layer = model.model.base_model.layers[2].mlp.up_proj
    with torch.no_grad():
        if how == "in place":
            layer.weight[3, 5] += 0.5
        elif how == "past autograd":
            layer.weight.data.mul_(1.5)
        else:
            layer.weight = torch.nn.Parameter(layer.weight.clone() * 1.5)
    assert model.fingerprint.differences(before) == ("weights",)
    assert len(reads) == 2


def test_models_that_were_passed_in_or_adapted_are_read(tmp_path: Path, cache: Path, reads: list[str]) -> None:
    path = save(tmp_path / "model")
    loaded = load(path)
    expected = loaded.fingerprint
    passed = BlockModel(loaded.model, loaded.tokenizer, facts=FINE_TUNED, kept_bytes=0)
    assert passed.fingerprint.weights == expected.weights
    assert len(reads) == 2
    model = load(path)
    model.model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert model.fingerprint.differences(expected) == ("adapter",)
    assert len(reads) == 3


def test_a_checkpoint_of_an_adapter_is_not_remembered(tmp_path: Path, cache: Path, reads: list[str]) -> None:
    base = save(tmp_path / "model")
    model = load(base)
    model.model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "small")
    model.model.peft_config["small"].base_model_name_or_path = str(base)
    model.model.save_pretrained(tmp_path / "adapter")
    model.tokenizer.save_pretrained(tmp_path / "adapter")
    remembered = cache.read_bytes()
    adapted = load(tmp_path / "adapter").fingerprint
    assert adapted.differences(load(base).fingerprint) == ("adapter",)
    assert cache.read_bytes() == remembered


def test_the_file_stays_small(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_module, "_MOST_ENTRIES", 3)
    for number in range(5):
        weights_module._remember(f"{number:032x}", {"weights": "0" * 32, "sample": "1" * 32})
    assert [int(key, 16) for key in json.loads(cache.read_text())["entries"]] == [2, 3, 4]


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_processes_that_load_at_once_agree(tmp_path: Path, cache: Path) -> None:
    paths = [save(tmp_path / "one"), save(tmp_path / "other", bump)]
    orders = [paths, paths[::-1], paths]
    children = []
    for number, order in enumerate(orders):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                said = [load(path).fingerprint.weights for path in (*order, *order)]
                (tmp_path / f"said-{number}").write_text(" ".join(said))
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    expected = {path: load(path).fingerprint.weights for path in paths}
    for number, order in enumerate(orders):
        assert (tmp_path / f"said-{number}").read_text().split() == [expected[path] for path in (*order, *order)]
    assert expected[paths[0]] != expected[paths[1]]
    assert 1 <= len(json.loads(cache.read_text())["entries"]) <= 2
    assert [file.name for file in cache.parent.iterdir() if file.name.startswith(".")] == []
