"""The house stands as drawn: imports point one way, heavy libraries stay behind their doors, nothing is unsafe."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import blockrag

PACKAGE = Path(blockrag.__file__).parent

# A module imports only from its own layer or those above it in this list.
LAYERS = [
    {"errors", "passage", "user_cache"},
    {"rope", "attention"},
    {"kv", "quantize", "codec", "fingerprint", "prompt", "kernels"},
    {"model", "compose", "stores", "encoders", "demo"},
    {"index", "ingest"},
    {"rag", "finetune", "evaluation", "planning"},
    {"server"},
    {"cli", "__main__"},
]
# The one place each heavy library may be imported.
DOORS = {
    "faiss": {"index"},
    "diskcache": {"stores"},
    "obstore": {"stores"},
    "redis": {"stores"},
    "sentence_transformers": {"encoders"},
    "llama_index": {"ingest"},
    "accelerate": {"finetune"},
    "peft": {"finetune"},
    "typer": {"cli"},
    "fastapi": {"server"},
    "starlette": {"server"},
    "uvicorn": {"server"},
    "pydantic": {"server"},
    "prometheus_client": {"server"},
}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def layer_of(room: str) -> int:
    return next(index for index, rooms in enumerate(LAYERS) if room in rooms)


def imports(path: Path, *, type_checking: bool = True) -> Iterator[str]:
    tree = ast.parse(path.read_text("utf-8"))
    hidden: set[int] = set()
    if not type_checking:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
                hidden.update(id(inner) for inner in ast.walk(node))
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} uses a relative import; write the full name"
            yield node.module or ""


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    here = layer_of(room_of(path))
    for name in imports(path):
        if name.startswith("blockrag."):
            room = name.split(".")[1]
            assert layer_of(room) <= here, f"{path.relative_to(PACKAGE)} (layer {here}) imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_libraries_stay_behind_their_doors(path: Path) -> None:
    for name in imports(path):
        rooms = DOORS.get(name.split(".")[0])
        assert rooms is None or room_of(path) in rooms, f"{path.relative_to(PACKAGE)} imports {name}"


def test_only_the_model_room_knows_transformers_modeling() -> None:
    for path in modules():
        if room_of(path) in {"model", "demo"}:
            continue
        for name in imports(path, type_checking=False):
            assert not name.startswith("transformers.models"), f"{path.relative_to(PACKAGE)} imports {name}"


def test_no_cycles_between_modules() -> None:
    graph: dict[str, set[str]] = {}
    for path in modules():
        name = "blockrag." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = {n for n in imports(path, type_checking=False) if n.startswith("blockrag.") and n != name}

    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name in done or name not in graph:
            return
        for other in graph[name]:
            visit(other, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_importing_blockrag_is_light() -> None:
    heavy = ["torch", "transformers", "faiss", "sentence_transformers", "llama_index", "diskcache", "numpy"]
    code = f"import blockrag, sys; print([m for m in {heavy!r} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_every_public_name_exists_and_is_documented() -> None:
    assert sorted(blockrag.__all__) == blockrag.__all__
    for name in blockrag.__all__:
        assert getattr(blockrag, name).__doc__, f"blockrag.{name} has no docstring"
    assert set(blockrag.__all__) <= set(dir(blockrag))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = blockrag.nonsense  # type: ignore[attr-defined]


def test_nothing_loads_code_from_data() -> None:
    forbidden = ("pickle.load", "pickle.dump", "torch.load(", "eval(", "exec(", "trust_remote_code=True")
    for path in modules():
        source = path.read_text("utf-8").replace("model.eval()", "").replace(".eval()", "")
        for text in forbidden:
            assert text not in source, f"{path.relative_to(PACKAGE)} contains {text}"


def test_every_module_says_what_it_is_for() -> None:
    for path in modules():
        assert ast.get_docstring(ast.parse(path.read_text("utf-8"))), f"{path.relative_to(PACKAGE)} has no docstring"
