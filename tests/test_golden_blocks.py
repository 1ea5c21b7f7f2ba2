"""Blocks that format version 1 wrote, kept as files: this release writes the same bytes, and reads the same numbers.

Should one of these tests fail, stored blocks of earlier releases would be misread: raise `FORMAT_VERSION`, keep these
files as those of version 1, and read or refuse them by name.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from blockrag.codec import decode, encode, read_header
from blockrag.errors import DamagedBlockError
from blockrag.kv import BlockKV, KVLayout, LayerShape
from blockrag.quantize import quantize

GOLDEN = Path(__file__).parent / "golden"
KEY, FINGERPRINT = "ab" * 32, "cd" * 16
# Two layers, one with values narrower than its keys.
LAYOUT = KVLayout((LayerShape(2, 4, 2, 4), LayerShape(1, 8, 1, 2)))
DIGESTS = {
    "float32": "5024abeba1cc96ceb5c02c72af982885f3a36acb1166af8b1f02b3527f77a952",
    "bfloat16": "32873ec2f5d1ec232e536ec24c9f8b8eeceb5658f78fbc92e70e57fff773b63a",
    "float16": "3cef5e14f3354e113eb5b24c611020ab8699f341a84ef6422cc4f173e426091a",
    "int8": "0804f140dafaae7d0282f94a159358fca3901ff3ec9de01a52a797ce2121f6f3",
    "int4": "52b12674bf0e0c5f83f41ced56bf5aed9ca84bf3327246ecfec2b2c77f7e739e",
}


@pytest.fixture(scope="module")
def kv() -> BlockKV:
    """Three tokens of fixed numbers, exact in 16 bit."""
    numbers = torch.arange(LAYOUT.elements_per_token * 3, dtype=torch.float32)
    return BlockKV(LAYOUT, 3, (numbers * 37 % 101 - 50) / 16)


@pytest.mark.parametrize("precision", DIGESTS)
class TestVersion1:
    def test_the_file_is_the_one_that_was_written_then(self, precision):
        assert hashlib.sha256((GOLDEN / f"v1-{precision}.block").read_bytes()).hexdigest() == DIGESTS[precision]

    def test_the_same_bytes_are_written(self, kv, precision):
        written = encode(kv, key=KEY, fingerprint=FINGERPRINT, precision=precision)
        assert bytes(written) == (GOLDEN / f"v1-{precision}.block").read_bytes()

    def test_the_same_numbers_are_read(self, kv, precision):
        data = (GOLDEN / f"v1-{precision}.block").read_bytes()
        found = decode(data, key=KEY, fingerprint=FINGERPRINT, layout=LAYOUT)
        if precision in ("int8", "int4"):
            assert torch.equal(found.payload, quantize(kv, precision).payload)
        else:
            assert torch.equal(found.data.float(), kv.data)
        header = read_header(data)
        assert (header.version, header.precision, header.num_tokens) == (1, precision, 3)
        assert (header.key, header.fingerprint, header.layout) == (KEY, FINGERPRINT, LAYOUT)

    def test_version_2_is_refused_by_name(self, precision):
        data = bytearray((GOLDEN / f"v1-{precision}.block").read_bytes())
        data[8] = 2
        with pytest.raises(DamagedBlockError, match="the block has format version 2, this release reads 1") as caught:
            decode(data, key=KEY, fingerprint=FINGERPRINT, layout=LAYOUT)
        assert caught.value.reason == "version"
