"""The codec: round trips, and that no damage, however small, gets through."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrag.codec import (
    LABEL_BYTES,
    BlockHeader,
    decode,
    encode,
    encoded_nbytes,
    payload_nbytes,
    read_header,
    read_label,
    view_encoded,
)
from blockrag.errors import DamagedBlockError, InputError
from blockrag.kv import BlockKV, KVLayout, LayerShape
from blockrag.quantize import QuantizedKV, StoredKV, quantize

KEY = "ab" * 32
FINGERPRINT = "cd" * 16
UNIFORM = KVLayout((LayerShape(2, 4, 2, 4),) * 2)
# Multi-head latent attention: one key head that is wider than the value, and a layer with more heads.
MIXED = KVLayout((LayerShape(1, 7, 1, 3), LayerShape(3, 2, 5, 1)))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZED = ("int8", "int4")
PRECISIONS = (*DTYPES, *QUANTIZED)


def make_kv(layout: KVLayout = UNIFORM, num_tokens: int = 3, dtype: torch.dtype = torch.float32) -> BlockKV:
    generator = torch.Generator().manual_seed(num_tokens)
    data = torch.randn(layout.elements_per_token * num_tokens, generator=generator)
    return BlockKV(layout=layout, num_tokens=num_tokens, data=data.to(dtype))


def encoded(precision: str = "float32", layout: KVLayout = UNIFORM, num_tokens: int = 3) -> bytearray:
    return encode(make_kv(layout, num_tokens), key=KEY, fingerprint=FINGERPRINT, precision=precision)


def read(data: bytes | bytearray | memoryview, layout: KVLayout = UNIFORM) -> StoredKV:
    return decode(data, key=KEY, fingerprint=FINGERPRINT, layout=layout)


def patched(data: bytearray, offset: int, fmt: str, *values: object) -> bytearray:
    """A forged block: header fields replaced, and the checksum made right again."""
    out = bytearray(data)
    struct.pack_into(fmt, out, offset, *values)
    out[16:32] = xxhash.xxh3_128_digest(bytes(out[:16]) + bytes(out[32:]))
    return out


layer_shapes = st.builds(LayerShape, *[st.integers(1, 3)] * 4)
layouts = st.lists(layer_shapes, min_size=1, max_size=6).map(lambda layers: KVLayout(tuple(layers)))


@given(layout=layouts, num_tokens=st.integers(1, 5), precision=st.sampled_from(sorted(DTYPES)), bits=st.randoms())
@settings(max_examples=60, deadline=None)
def test_same_dtype_comes_back_bit_for_bit(layout, num_tokens, precision, bits):
    dtype = DTYPES[precision]
    raw = torch.frombuffer(bytearray(bits.randbytes(layout.nbytes(num_tokens, dtype.itemsize))), dtype=dtype)
    kv = BlockKV(layout=layout, num_tokens=num_tokens, data=torch.where(torch.isfinite(raw), raw, 1.0))

    data = encode(kv, key=KEY, fingerprint=FINGERPRINT, precision=precision)
    back = decode(data, key=KEY, fingerprint=FINGERPRINT, layout=layout)

    assert len(data) == encoded_nbytes(layout, num_tokens, precision)
    assert back.num_tokens == num_tokens
    assert back.data.dtype == dtype
    assert torch.equal(back.data.view(torch.uint8), kv.data.view(torch.uint8))


@pytest.mark.parametrize("source", sorted(DTYPES))
@pytest.mark.parametrize("precision", sorted(DTYPES))
def test_other_dtypes_are_rounded_as_torch_rounds(source, precision):
    kv = make_kv(MIXED, dtype=DTYPES[source])
    back = read(encode(kv, key=KEY, fingerprint=FINGERPRINT, precision=precision), MIXED)
    assert torch.equal(back.data, kv.data.to(DTYPES[precision]))
    assert torch.equal(back.keys(1), kv.keys(1).to(DTYPES[precision]))


@given(
    layout=layouts,
    num_tokens=st.integers(1, 9),
    precision=st.sampled_from(QUANTIZED),
    source=st.sampled_from([*DTYPES]),
)
@settings(max_examples=40, deadline=None)
def test_quantised_states_come_back_bit_for_bit(layout, num_tokens, precision, source):
    kv = make_kv(layout, num_tokens, DTYPES[source])
    data = encode(kv, key=KEY, fingerprint=FINGERPRINT, precision=precision)
    back = decode(data, key=KEY, fingerprint=FINGERPRINT, layout=layout)
    assert len(data) == encoded_nbytes(layout, num_tokens, precision)
    assert isinstance(back, QuantizedKV)
    assert (back.num_tokens, back.precision) == (num_tokens, precision)
    assert back.nbytes == payload_nbytes(layout, num_tokens, precision)
    assert torch.equal(back.payload, quantize(kv, precision).payload)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_was_just_encoded_is_viewed_as_it_is_decoded(precision):
    data = encoded(precision, MIXED)
    seen, decoded = view_encoded(data, layout=MIXED), read(data, MIXED)
    assert type(seen) is type(decoded)
    assert (seen.layout, seen.num_tokens) == (MIXED, 3)
    for layer in range(MIXED.num_layers):
        assert torch.equal(seen.keys(layer), decoded.keys(layer))
        assert torch.equal(seen.values(layer), decoded.values(layer))
    # Over the same bytes, and without reading them for a checksum.
    data[-1] ^= 1
    with pytest.raises(DamagedBlockError):
        read(data, MIXED)
    assert not torch.equal(view_encoded(data, layout=MIXED).values(1), quantize(make_kv(MIXED), "int8").values(1))


def test_a_tensor_that_needs_gradients_is_encoded_without_them():
    kv = make_kv()
    kv.data.requires_grad_(True)
    assert not read(encode(kv, key=KEY, fingerprint=FINGERPRINT, precision="float32")).data.requires_grad


def test_payload_is_aligned_and_the_header_is_what_the_page_says():
    data = encoded("bfloat16", MIXED)
    header = read_header(data)
    assert header == BlockHeader(1, "bfloat16", 3, MIXED, KEY, FINGERPRINT, 128, MIXED.nbytes(3, 2))
    assert header.payload_offset % 64 == 0
    assert bytes(data[:12]) == b"\x93BLKKV\r\n\x01\x00\x02\x00"
    assert bytes(data[32:80]) == bytes.fromhex(KEY + FINGERPRINT)
    assert struct.unpack_from("<IIQ", data, 80) == (3, 2, MIXED.nbytes(3, 2))
    assert struct.unpack_from("<8I", data, 96) == (1, 7, 1, 3, 3, 2, 5, 1)


class TestCopies:
    def test_writable_buffer_is_used_in_place(self):
        data = encoded()
        block = read(memoryview(data))
        data[-4:] = struct.pack("<f", 42.0)
        assert block.data[-1] == 42.0

    @pytest.mark.parametrize("wrap", [bytes, lambda data: memoryview(bytes(data))], ids=["bytes", "read-only view"])
    def test_read_only_buffer_is_copied_without_a_warning(self, wrap):
        block = read(wrap(encoded()))
        block.data.add_(0)
        assert torch.equal(block.data, make_kv().data)

    @pytest.mark.parametrize("shift", [1, 2, 3])
    def test_misaligned_buffer_is_copied(self, shift):
        block = read(memoryview(bytes(shift) + encoded())[shift:])
        assert block.data.data_ptr() % 4 == 0
        writable = read(memoryview(bytearray(shift) + encoded())[shift:])
        assert writable.data.data_ptr() % 4 == 0
        assert torch.equal(writable.data, make_kv().data)

    def test_items_wider_than_a_byte_are_bytes_all_the_same(self):
        assert torch.equal(read(memoryview(encoded()).cast("I")).data, make_kv().data)

    def test_encoding_allocates_the_result_and_little_else(self):
        layout = KVLayout((LayerShape(4, 64, 4, 64),) * 4)
        kv = make_kv(layout, 256)
        tracemalloc.start()
        data = encode(kv, key=KEY, fingerprint=FINGERPRINT, precision="float32")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < len(data) * 1.05


class TestDamage:
    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_every_flipped_bit_is_noticed(self, precision):
        data = encoded(precision, KVLayout((LayerShape(1, 2, 1, 2),)), 2)
        for bit in range(len(data) * 8):
            data[bit // 8] ^= 1 << bit % 8
            with pytest.raises(DamagedBlockError):
                read_header(data)
            data[bit // 8] ^= 1 << bit % 8
        read_header(data)

    def test_every_truncation_and_extension_is_noticed(self):
        data = encoded()
        for length in range(len(data)):
            with pytest.raises(DamagedBlockError) as caught:
                read(memoryview(data)[:length])
            assert caught.value.reason == "length"
        with pytest.raises(DamagedBlockError) as caught:
            read(data + b"\0")
        assert caught.value.reason == "length"

    @given(noise=st.binary(max_size=400))
    @settings(max_examples=200, deadline=None)
    def test_noise_is_refused(self, noise):
        with pytest.raises(DamagedBlockError):
            read(noise)
        with pytest.raises(DamagedBlockError):
            read(bytes(encoded()[:32]) + noise)

    def test_zeroed_page_is_noticed(self):
        data = encoded(num_tokens=300)
        data[4096:8192] = bytes(4096)
        with pytest.raises(DamagedBlockError) as caught:
            read(data)
        assert caught.value.reason == "checksum"

    def test_swapped_blocks_are_noticed(self):
        other = "01" * 32
        with pytest.raises(DamagedBlockError, match=f"asked for block {other}, the bytes are block {KEY}") as caught:
            decode(encoded(), key=other, fingerprint=FINGERPRINT, layout=UNIFORM)
        assert caught.value.reason == "key"

    def test_another_models_block_is_noticed(self):
        with pytest.raises(DamagedBlockError, match=FINGERPRINT) as caught:
            decode(encoded(), key=KEY, fingerprint="00" * 16, layout=UNIFORM)
        assert caught.value.reason == "fingerprint"

    @pytest.mark.parametrize(
        "layout",
        [
            KVLayout((LayerShape(2, 4, 2, 4),) * 3),
            KVLayout((LayerShape(4, 2, 2, 4),) * 2),
            KVLayout((LayerShape(2, 4, 2, 4), LayerShape(2, 4, 4, 2))),
        ],
        ids=["layers", "key heads", "value heads"],
    )
    def test_another_layout_is_noticed(self, layout):
        with pytest.raises(DamagedBlockError) as caught:
            read(encoded(), layout)
        assert caught.value.reason == "shape"

    @pytest.mark.parametrize(
        ("offset", "fmt", "value", "reason"),
        [
            (0, "<B", 0, "magic"),
            (8, "<H", 2, "version"),
            (8, "<H", 0, "version"),
            (10, "<H", 0, "precision"),
            (10, "<H", 4, "shape"),
            (10, "<H", 6, "precision"),
            (10, "<H", 3, "shape"),
            (12, "<I", 64, "length"),
            (12, "<I", 2**32 - 64, "length"),
            (80, "<I", 0, "shape"),
            (80, "<I", 2**32 - 1, "shape"),
            (84, "<I", 2**32 - 1, "length"),
            (84, "<I", 0, "shape"),
            (88, "<Q", 2**64 - 1, "length"),
            (88, "<Q", 0, "length"),
            (96, "<I", 2**32 - 1, "shape"),
        ],
    )
    def test_forged_headers_are_refused_and_allocate_nothing(self, offset, fmt, value, reason):
        data = patched(encoded(), offset, fmt, value)
        tracemalloc.start()
        with pytest.raises(DamagedBlockError) as caught:
            read(data)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert caught.value.reason == reason
        assert peak < 1 << 20

    @pytest.mark.parametrize("precision", QUANTIZED)
    @pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0, -1.0])
    @pytest.mark.parametrize("part", ["key_scales", "value_scales"])
    def test_a_bad_scale_under_a_right_checksum_is_refused(self, precision, scale, part):
        data = encoded(precision, MIXED)
        kv = read(data, MIXED)
        assert isinstance(kv, QuantizedKV)
        section = getattr(kv.sections(1), part)
        offset = len(data) - kv.nbytes + section.offset + section.nbytes - 2
        with pytest.raises(DamagedBlockError, match="scale") as caught:
            read(patched(data, offset, "<e", scale), MIXED)
        assert caught.value.reason == "scale"

    @pytest.mark.parametrize("precision", QUANTIZED)
    @pytest.mark.parametrize("channel", [-1, 13, 2**31 - 1])
    def test_a_refined_channel_that_is_none_is_refused(self, precision, channel):
        data = encoded(precision, MIXED)
        kv = read(data, MIXED)
        assert isinstance(kv, QuantizedKV)
        offset = len(data) - kv.nbytes
        with pytest.raises(DamagedBlockError, match="channel") as caught:
            read(patched(data, offset, "<i", channel), MIXED)
        assert caught.value.reason == "channel"

    @pytest.mark.parametrize(("at_rest", "claimed"), [("int8", 5), ("int4", 4), ("float16", 4), ("int8", 3)])
    def test_another_precision_than_the_payloads_is_refused(self, at_rest, claimed):
        with pytest.raises(DamagedBlockError) as caught:
            read(patched(encoded(at_rest, MIXED), 10, "<H", claimed), MIXED)
        assert caught.value.reason == "shape"

    def test_forged_header_without_elements_is_refused(self):
        empty = patched(encoded()[:128], 88, "<Q", 0)
        with pytest.raises(DamagedBlockError) as caught:
            read(patched(empty, 96, "<8I", *[0] * 8))
        assert caught.value.reason == "shape"


class TestBadInput:
    @pytest.mark.parametrize("precision", PRECISIONS)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize(("layer", "part"), [(0, "keys"), (1, "values")])
    def test_nonfinite_elements_are_refused_with_their_layer(self, precision, value, layer, part):
        kv = make_kv()
        getattr(kv, part)(layer)[0, 1, 2] = value
        with pytest.raises(InputError, match=f"layer {layer}: the {part} hold NaN or infinity"):
            encode(kv, key=KEY, fingerprint=FINGERPRINT, precision=precision)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_float16_overflow_says_which_layer_and_what_to_use(self, sign):
        kv = make_kv()
        kv.keys(1)[0, 0, 0] = sign * 70000.0
        with pytest.raises(InputError, match=r"layer 1: the keys reach 70000, float16 holds 65504; use bfloat16 or"):
            encode(kv, key=KEY, fingerprint=FINGERPRINT, precision="float16")
        encode(kv, key=KEY, fingerprint=FINGERPRINT, precision="bfloat16")

    def test_bfloat16_overflow_says_float32(self):
        kv = make_kv()
        kv.values(0)[0, 0, 0] = torch.finfo(torch.float32).max
        with pytest.raises(InputError, match=r"layer 0: the values reach 3\.40282e\+38, bfloat16 .* use float32"):
            encode(kv, key=KEY, fingerprint=FINGERPRINT, precision="bfloat16")

    @pytest.mark.parametrize("precision", QUANTIZED)
    def test_what_overflows_float16_fits_integers(self, precision):
        kv = make_kv()
        kv.keys(1)[0, 0, 0] = 70000.0
        back = read(encode(kv, key=KEY, fingerprint=FINGERPRINT, precision=precision))
        assert back.keys(1)[0, 0, 0] == pytest.approx(70000, rel=1e-3)

    def test_largest_float16_fits(self):
        kv = make_kv()
        kv.keys(0)[0, 0, 0] = 65504.0
        back = read(encode(kv, key=KEY, fingerprint=FINGERPRINT, precision="float16"))
        assert back.keys(0)[0, 0, 0] == 65504.0

    @pytest.mark.parametrize(
        ("layout", "dtype"), [(UNIFORM, torch.int8), (KVLayout(()), torch.float32)], ids=["integers", "no layers"]
    )
    def test_what_is_no_kv_state_is_refused(self, layout, dtype):
        kv = BlockKV(layout, 1, torch.zeros(layout.elements_per_token, dtype=dtype))
        with pytest.raises(InputError, match="cannot encode"):
            encode(kv, key=KEY, fingerprint=FINGERPRINT, precision="float32")

    @pytest.mark.parametrize("key", ["", "AB" * 32, "ab" * 31, "ab" * 32 + "\n", "zz" * 32, 7, None])
    def test_malformed_keys_are_refused(self, key):
        with pytest.raises(InputError, match="is not a block key"):
            encode(make_kv(), key=key, fingerprint=FINGERPRINT, precision="float32")
        with pytest.raises(InputError, match="is not a block key"):
            decode(encoded(), key=key, fingerprint=FINGERPRINT, layout=UNIFORM)

    def test_malformed_fingerprint_is_refused(self):
        with pytest.raises(InputError, match="is not a fingerprint"):
            encode(make_kv(), key=KEY, fingerprint="weights", precision="float32")

    def test_unknown_precision_is_refused(self):
        with pytest.raises(InputError, match="'int2'; use one of float32, bfloat16, float16, int8, int4"):
            encode(make_kv(), key=KEY, fingerprint=FINGERPRINT, precision="int2")

    @pytest.mark.parametrize("data", ["text", memoryview(bytes(64))[::2], None], ids=["str", "strided", "None"])
    def test_what_is_no_buffer_is_refused(self, data):
        with pytest.raises(InputError, match="no contiguous byte buffer"):
            read(data)


class TestLabel:
    def test_says_what_the_first_bytes_say(self):
        data = encoded()
        label = read_label(data[:LABEL_BYTES])
        assert (label.key, label.fingerprint) == (KEY, FINGERPRINT)
        assert label.checksum == xxhash.xxh3_128_hexdigest(bytes(data[:16] + data[32:]))
        assert read_label(data) == label

    @pytest.mark.parametrize(
        ("head", "reason"),
        [(lambda data: data[: LABEL_BYTES - 1], "length"), (lambda data: b"x" + data[1:], "magic"),
         (lambda data: data[:8] + b"\2" + data[9:], "version")],
    )  # fmt: skip
    def test_refuses_what_is_no_block(self, head, reason):
        with pytest.raises(DamagedBlockError) as error:
            read_label(head(encoded()))
        assert error.value.reason == reason
