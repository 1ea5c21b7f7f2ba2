"""Fingerprints and keys: what differs must differ, what does not matter must not."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import byte_level_tokenizer, chatml_tokenizer, llama3_tokenizer

from blockrag import codec
from blockrag.errors import InputError
from blockrag.fingerprint import (
    FORMAT_VERSION,
    Fingerprint,
    block_key,
    hash_json,
    hash_tensors,
    hash_tokenizer,
)

FACTORS = (
    "weights",
    "config",
    "rope",
    "tokenizer",
    "template",
    "compute_dtype",
    "precision",
    "attention",
    "adapter",
    "splitting",
    "positions",
    "library",
    "format",
)
BASE = Fingerprint(
    weights="w", config="c", rope="r", tokenizer="t", template="p", compute_dtype="float32", precision="float16"
)
DIGEST = "0123456789abcdef" * 2

token_lists = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


class TestFingerprint:
    def test_factors_are_the_agreed_ones(self):
        assert tuple(field.name for field in fields(Fingerprint)) == FACTORS
        assert BASE.format == str(FORMAT_VERSION)
        assert codec.FORMAT_VERSION == FORMAT_VERSION

    def test_golden_digest(self):
        """A change here makes every stored block of earlier releases a miss; make it on purpose or not at all."""
        assert BASE.digest == "693b537ca838ce1c76ac22ff4cb2ca7d"

    @pytest.mark.parametrize("name", FACTORS)
    def test_every_factor_changes_the_digest_and_is_named(self, name):
        other = replace(BASE, **{name: "other"})
        assert other.digest != BASE.digest
        assert other.differences(BASE) == BASE.differences(other) == (name,)

    def test_equal_fingerprints_differ_in_nothing(self):
        assert replace(BASE).differences(BASE) == ()
        assert replace(BASE).digest == BASE.digest

    def test_swapped_factors_differ(self):
        swapped = replace(BASE, weights="c", config="w")
        assert swapped.digest != BASE.digest
        assert swapped.differences(BASE) == ("weights", "config")

    def test_changes_are_said_with_what_was_and_what_is(self):
        digest = "91bc" * 8
        now = replace(BASE, tokenizer=digest, precision="int8", library="transformers 6")
        assert [str(change) for change in now.changes_since(replace(BASE, tokenizer="3f2a" * 8))] == [
            "stored for tokenizer 3f2a3f2a..., asked with 91bc91bc...",
            "stored for precision float16, asked with int8",
            "stored for library none, asked with transformers 6",
        ]
        assert now.changes_since(now) == ()

    def test_another_dtype_explains_other_weights_and_frequencies(self):
        now = replace(BASE, weights="v", rope="s", compute_dtype="bfloat16", config="d")
        assert [change.name for change in now.changes_since(BASE)] == ["config", "compute_dtype"]
        assert now.differences(BASE) == ("weights", "config", "rope", "compute_dtype")

    @given(values=st.lists(texts.filter(bool), min_size=len(FACTORS), max_size=len(FACTORS)))
    @settings(max_examples=50, deadline=None)
    def test_json_round_trip(self, values):
        fingerprint = Fingerprint(**dict(zip(FACTORS, values, strict=True)))
        assert Fingerprint.from_json(fingerprint.to_json()) == fingerprint
        assert "\n" not in fingerprint.to_json()

    @pytest.mark.parametrize(
        "text",
        ["", "{", "[]", "null", "{}", json.dumps({**json.loads(BASE.to_json()), "extra": "x"}), "[" * 100_000, None],
        ids=["empty", "cut", "list", "null", "no factors", "unknown factor", "deep", "None"],
    )
    def test_damaged_json_is_refused(self, text):
        with pytest.raises(InputError, match="rebuild it"):
            Fingerprint.from_json(text)

    @pytest.mark.parametrize("value", ["", None, 3])
    def test_factors_are_non_empty_strings(self, value):
        with pytest.raises(InputError, match="fingerprint factor 'rope'"):
            replace(BASE, rope=value)
        factors = {**json.loads(BASE.to_json()), "rope": value}
        with pytest.raises(InputError, match="fingerprint factor 'rope'"):
            Fingerprint.from_json(json.dumps(factors))


class TestBlockKey:
    def test_golden_key(self):
        """A change here makes every stored block of earlier releases a miss; make it on purpose or not at all."""
        assert (
            block_key([1, 2, 300_000], fingerprint=DIGEST)
            == "4707058df5e7d7157732a4613a3fd7742ca0b6fe193004a8dd091c66e99c5c9b"
        )
        assert (
            block_key([1], fingerprint=DIGEST, regime="long", namespace="tenant")
            == "5d3e05c6e68935b945acd7e9eab0cd6b28c5a6679383ee9f683ebe7459578175"
        )

    @given(first=st.tuples(token_lists, texts, texts), second=st.tuples(token_lists, texts, texts))
    @settings(max_examples=200, deadline=None)
    def test_equal_exactly_when_every_field_is_equal(self, first, second):
        def key(args):
            return block_key(args[0], fingerprint=DIGEST, regime=args[1], namespace=args[2])

        assert (key(first) == key(second)) == (first == second)

    @given(ids=token_lists, cut=st.integers(0, 20))
    @settings(max_examples=100, deadline=None)
    def test_bytes_cannot_move_between_the_ids_and_the_regime(self, ids, cut):
        moved = bytes(b for i in ids[:cut] for b in i.to_bytes(4, "little")).decode("latin-1")
        if ids[cut:] and moved:
            whole = block_key(ids, fingerprint=DIGEST, regime="")
            assert whole != block_key(ids[cut:], fingerprint=DIGEST, regime=moved)

    def test_order_matters(self):
        assert block_key([1, 2], fingerprint=DIGEST) != block_key([2, 1], fingerprint=DIGEST)

    def test_fingerprint_and_regime_matter(self):
        base = block_key([1, 2], fingerprint=DIGEST)
        assert block_key([1, 2], fingerprint=DIGEST[::-1]) != base
        assert block_key([1, 2], fingerprint=DIGEST, regime="long") != base

    def test_namespaces_share_nothing(self):
        keys = {block_key([1, 2], fingerprint=DIGEST, namespace=name) for name in ("", "a", "b", "ab", "é", "x" * 999)}
        assert len(keys) == 6

    def test_a_namespace_is_not_a_prefix_anybody_can_spell(self):
        """Keyed, not concatenated: the regime cannot be chosen to reach another namespace's keys."""
        target = block_key([1], fingerprint=DIGEST, regime="r", namespace="n")
        tries = {block_key([1], fingerprint=DIGEST, regime=regime) for regime in ("nr", "n/r", "n\0r", "r", "rn")}
        assert target not in tries

    @pytest.mark.parametrize(
        "make", [tuple, list, lambda ids: torch.tensor(ids).numpy()], ids=["tuple", "list", "array"]
    )
    def test_any_sequence_of_integers_will_do(self, make):
        assert block_key(make([5, 6]), fingerprint=DIGEST) == block_key([5, 6], fingerprint=DIGEST)

    @pytest.mark.parametrize("ids", [[-1], [2**32], [1.5], ["1"], [None]])
    def test_what_is_no_token_id_is_refused(self, ids):
        with pytest.raises(InputError, match=r"token ids must be integers in \[0, 2\*\*32\)"):
            block_key(ids, fingerprint=DIGEST)

    def test_empty_block_is_refused(self):
        with pytest.raises(InputError, match="at least one token id"):
            block_key([], fingerprint=DIGEST)

    @pytest.mark.parametrize("fingerprint", ["", "g" * 32, DIGEST.upper(), DIGEST + "\n", None])
    def test_malformed_fingerprint_is_refused(self, fingerprint):
        with pytest.raises(InputError, match="is not a fingerprint"):
            block_key([1], fingerprint=fingerprint)

    @pytest.mark.parametrize("field", ["regime", "namespace"])
    def test_lone_surrogates_are_refused(self, field):
        with pytest.raises(InputError, match=f"the {field} .* lone surrogate"):
            block_key([1], fingerprint=DIGEST, **{field: "\ud800"})


class TestHashJson:
    def test_golden(self):
        assert hash_json({"b": [1, 2.5, None, True], "a": "é"}) == "745e9b9a434074cefb8e8ca000ab601a"

    def test_key_order_and_json_round_trips_do_not_matter(self):
        value = {"b": (1, 2), "a": {3: "x"}}
        assert hash_json(value) == hash_json({"a": {"3": "x"}, "b": [1, 2]})
        assert hash_json(value) == hash_json(json.loads(json.dumps(value)))

    @pytest.mark.parametrize(
        ("left", "right"), [([1, 2], [2, 1]), ("1", 1), (1, 1.0), (None, "null"), ([[]], []), ({"a": None}, {})]
    )
    def test_different_values_differ(self, left, right):
        assert hash_json(left) != hash_json(right)

    @pytest.mark.parametrize(
        "value", [float("nan"), float("inf"), {1, 2}, b"x", torch.float32, {1: 0, "a": 0}], ids=str
    )
    def test_what_has_no_canonical_form_is_refused(self, value):
        with pytest.raises(InputError, match="no canonical JSON"):
            hash_json(value)


class TestHashTensors:
    def test_golden(self):
        tensors = [("a", torch.arange(6.0).reshape(2, 3)), ("b", torch.ones(2, dtype=torch.bfloat16))]
        assert hash_tensors(tensors) == "0dc291899e91ce0702dc0edf62e31609"

    @pytest.mark.parametrize(
        "dtype",
        [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.bool],
        ids=str,
    )
    def test_every_element_and_the_dtype_count(self, dtype):
        tensor = torch.arange(24).reshape(2, 3, 4).bool().to(dtype)
        base = hash_tensors([("w", tensor)])
        changed = tensor.clone()
        changed.view(-1).view(torch.uint8)[-1] ^= 1
        assert hash_tensors([("w", tensor.clone())]) == base
        assert hash_tensors([("w", changed)]) != base

    def test_same_bytes_in_another_dtype_or_shape_differ(self):
        zeros = torch.zeros(2, 4)
        same_bytes = [zeros, zeros.view(torch.int32), zeros.view(torch.bfloat16), zeros.reshape(4, 2), zeros.flatten()]
        assert len({hash_tensors([("w", tensor)]) for tensor in same_bytes}) == 5

    def test_names_count_and_order_does_not(self):
        a, b = ("a", torch.ones(2)), ("b", torch.zeros(2))
        assert hash_tensors([a, b]) == hash_tensors([b, a])
        assert hash_tensors([a, b]) != hash_tensors([("a", b[1]), ("b", a[1])])
        assert hash_tensors([a]) != hash_tensors([a, b])

    @pytest.mark.parametrize(
        "view",
        [
            lambda t: t.T,
            lambda t: t[:, ::2],
            lambda t: t[1:, 1:],
            lambda t: t.expand(3, *t.shape),
            lambda t: t.requires_grad_(True),
        ],
        ids=["transposed", "strided", "slice", "expanded", "requires grad"],
    )
    def test_strides_do_not_matter(self, view):
        tensor = view(torch.arange(30.0).reshape(5, 6))
        assert hash_tensors([("w", tensor)]) == hash_tensors([("w", tensor.detach().clone().contiguous())])

    def test_large_non_contiguous_tensors_are_read_in_pieces(self, monkeypatch):
        tensor = torch.arange(5 * 7 * 3, dtype=torch.float32).reshape(3, 7, 5).transpose(0, 2)
        whole = hash_tensors([("w", tensor.contiguous())])
        for chunk_bytes in (1, 84, 100, 200):
            monkeypatch.setattr("blockrag.fingerprint._CHUNK_BYTES", chunk_bytes)
            assert hash_tensors([("w", tensor)]) == whole

    def test_scalars_and_empty_tensors(self):
        scalar, one, empty = torch.tensor(1.0), torch.ones(1), torch.zeros(0, 3)
        assert len({hash_tensors([("w", tensor)]) for tensor in (scalar, one, empty)}) == 3
        assert hash_tensors([]) != hash_tensors([("w", empty)])

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_device_does_not_matter(self):
        tensor = torch.arange(30.0, dtype=torch.bfloat16).reshape(5, 6)
        assert hash_tensors([("w", tensor.cuda())]) == hash_tensors([("w", tensor)])

    @pytest.mark.parametrize(
        "tensor", [torch.zeros(2, device="meta"), torch.eye(2).to_sparse()], ids=["meta", "sparse"]
    )
    def test_what_has_no_bytes_is_refused(self, tensor):
        with pytest.raises(InputError, match=r"tensor 'w' .* no plain bytes"):
            hash_tensors([("w", tensor)])

    def test_repeated_names_are_refused(self):
        with pytest.raises(InputError, match="'w' comes twice"):
            hash_tensors([("w", torch.ones(1)), ("w", torch.ones(1))])


class SlowTokenizer:
    """A tokenizer without a backend, as slow tokenizers present themselves."""

    def __init__(self, vocab=("a", "b"), added=(), **special):
        self._vocab, self._added = {token: i for i, token in enumerate(vocab)}, dict(added)
        self.special_tokens_map = special

    @property
    def all_special_ids(self):
        return [self._vocab[token] for token in self.special_tokens_map.values()]

    def get_vocab(self):
        return dict(self._vocab)

    def get_added_vocab(self):
        return dict(self._added)


class TestHashTokenizer:
    def test_calls_leave_no_trace(self):
        tokenizer = llama3_tokenizer()
        before = hash_tokenizer(tokenizer)
        tokenizer(["a", "long text"], padding=True, truncation=True, max_length=3)
        assert hash_tokenizer(tokenizer) == before

    def test_saved_and_loaded_is_the_same(self, tmp_path):
        tokenizer = chatml_tokenizer()
        tokenizer.save_pretrained(tmp_path)
        assert hash_tokenizer(type(tokenizer).from_pretrained(tmp_path)) == hash_tokenizer(tokenizer)

    def test_vocabulary_and_special_tokens_count(self):
        tokenizers = [
            llama3_tokenizer(),
            chatml_tokenizer(),
            byte_level_tokenizer(["<s>"], bos_token="<s>"),
            byte_level_tokenizer(["<s>"], eos_token="<s>"),
            byte_level_tokenizer(["<s>"], bos_token="<s>", vocab_size=300),
        ]
        assert len({hash_tokenizer(tokenizer) for tokenizer in tokenizers}) == 5

    def test_added_token_counts(self):
        tokenizer = llama3_tokenizer()
        before = hash_tokenizer(tokenizer)
        tokenizer.add_tokens(["<new>"])
        assert hash_tokenizer(tokenizer) != before

    def test_chat_template_does_not_count(self):
        tokenizer = llama3_tokenizer()
        before = hash_tokenizer(tokenizer)
        tokenizer.chat_template = "{{ messages }}"
        assert hash_tokenizer(tokenizer) == before

    def test_slow_tokenizers(self):
        base = hash_tokenizer(SlowTokenizer())
        assert hash_tokenizer(SlowTokenizer()) == base
        others = [SlowTokenizer(("b", "a")), SlowTokenizer(added={"c": 2}), SlowTokenizer(eos_token="a")]
        assert len({base, *map(hash_tokenizer, others)}) == 4

    def test_what_is_no_tokenizer_is_refused(self):
        with pytest.raises(InputError, match="str is not a tokenizer"):
            hash_tokenizer("gpt2")
