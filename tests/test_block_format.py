"""docs/block-format.md describes the bytes that are written: its reader reads them, its table has the fields."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from blockrag.codec import encode
from blockrag.kv import BlockKV, KVLayout, LayerShape

PAGE = Path(__file__).parents[1] / "docs" / "block-format.md"
KEY, FINGERPRINT = "ab" * 32, "cd" * 16
# A layer that shares another's states, and one whose values are narrower than its keys.
LAYOUT = KVLayout((LayerShape(2, 4, 2, 4), LayerShape(0, 0, 0, 0), LayerShape(1, 8, 1, 2)))


def documented_reader():
    """The reader of the page, as a function."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return names["read_block"]


@pytest.fixture(scope="module")
def kv() -> BlockKV:
    torch.manual_seed(0)
    return BlockKV(LAYOUT, 5, torch.randn(LAYOUT.elements_per_token * 5))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("float16", torch.float16), ("bfloat16", torch.bfloat16)]
)
def test_the_reader_of_the_page_reads_what_is_written(kv, precision, dtype):
    states = documented_reader()(bytes(encode(kv, key=KEY, fingerprint=FINGERPRINT, precision=precision)))
    assert len(states) == 3
    for layer, (keys, values) in enumerate(states):
        for read, written in ((keys, kv.keys(layer)), (values, kv.values(layer))):
            expected = written.to(dtype)
            found = torch.from_numpy(read.copy())
            assert torch.equal(found.view(dtype) if precision == "bfloat16" else found, expected)


def test_the_reader_of_the_page_refuses_damage(kv):
    data = encode(kv, key=KEY, fingerprint=FINGERPRINT, precision="float32")
    data[-1] ^= 1
    with pytest.raises(ValueError, match="damaged"):
        documented_reader()(bytes(data))


def test_the_table_has_the_fields_where_they_are(kv):
    """The rows of the table, applied to an encoded block, give back what it was made from."""
    data = bytes(encode(kv, key=KEY, fingerprint=FINGERPRINT, precision="float16"))
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ([a-z ]+)", PAGE.read_text("utf-8"), re.MULTILINE)
    found = {name.strip(): data[int(offset) : int(offset) + int(size)] for offset, size, name in rows}
    numbers = {name: int.from_bytes(value, "little") for name, value in found.items()}
    assert found["magic"] == b"\x93BLKKV\r\n"
    assert (numbers["format version"], numbers["precision"]) == (1, 3)
    assert (found["key"].hex(), found["fingerprint"].hex()) == (KEY, FINGERPRINT)
    assert (numbers["tokens"], numbers["layers"]) == (5, 3)
    assert numbers["payload bytes"] == LAYOUT.elements_per_token * 5 * 2
    assert numbers["header bytes"] + numbers["payload bytes"] == len(data)
