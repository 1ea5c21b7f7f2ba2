"""One flipped bit anywhere in a store: a reader gets the right block, a typed error or nothing, never another block."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch
from blocks import FINGERPRINT, HEADER_BYTES, IN_ROW, LAYOUT, block, judge, key
from fresh import call
from test_exactness import composed_logits, prompt_of

from blockrag import codec
from blockrag.kv import BlockKV
from blockrag.stores import DiskStore

HEADER_BITS = HEADER_BYTES * 8


def test_every_flip_in_a_block_is_noticed(tmp_path, scale, record):
    """Header bits one by one, payload bits at random, in the files of an open store."""
    flips = scale(ci=4000, long=70_000)
    counts = call("flipping:flip_blocks", directory=str(tmp_path / "s"), flips=flips, seed=1)
    assert counts == {"refused": flips, "healed": flips, "unchecked": flips - HEADER_BITS}
    record(
        "bit flips in stored blocks: every header bit, random payload bits",
        tried=flips,
        unit="flips",
        result="100 % detected; without the checksum, 100 % of the payload flips would be used",
    )


def test_no_flip_in_the_index_gives_a_wrong_block(fast_path, scale, record):
    """Index and write-ahead log: the process never crashes or hangs, and every error is the store's own."""
    flips = scale(ci=1000, long=30_000)
    counts = call("flipping:flip_index", directory=str(fast_path / "s"), flips=flips, seed=2)
    assert counts.get("wrong", 0) == 0
    assert counts.get("written: wrong", 0) == 0
    # The flips do reach what is read: some are met by the codec, some by the store.
    refused = sum(counts.get(f"refused to {what}", 0) for what in ("open", "read", "check", "write"))
    assert counts["refused"] > 0
    assert counts["missing"] > 0
    assert refused > 0
    record(
        "bit flips in the index and its write-ahead log",
        tried=flips,
        unit="flips",
        result=f"0 wrong blocks in {counts['reads']:,} reads, 0 crashes; {counts['right']:,} right, "
        f"{counts['missing']:,} missed, {counts['refused']:,} refused by the codec, {refused:,} typed errors",
    )


@pytest.mark.parametrize("precision", ["float32", "int4"])
def test_a_damaged_block_is_computed_again_bit_for_bit(make_model, tmp_path, scale, record, precision):
    """A prompt over a damaged block has the logits it had, and leaves the block as it was."""
    random_numbers = random.Random(3)
    prompt = prompt_of([120, 40, 7], 6)
    with contextlib.closing(DiskStore(tmp_path / "s")) as store:
        model = make_model(store=store, precision=precision)
        # One at a time, as a block that is missing from a prompt is computed: the batch decides the last bits.
        for block in prompt.local_blocks:
            model.materialize([block])
        sound = {key: bytes(store.get(key)) for key in store.keys()}
        logits = composed_logits(model, prompt)
        flips = scale(ci=50, long=1000)
        for _ in range(flips):
            key, data = random_numbers.choice(sorted(sound.items()))
            damaged = bytearray(data)
            bit = random_numbers.randrange(len(damaged) * 8)
            damaged[bit // 8] ^= 1 << bit % 8
            store.put(key, damaged)
            assert torch.equal(composed_logits(model, prompt), logits)
            assert bytes(store.get(key)) == data
        assert {key: bytes(store.get(key)) for key in store.keys()} == sound
    record(
        f"prompts over a block with a flipped bit, {precision} at rest",
        tried=flips,
        unit="prompts",
        result="every damaged block computed again, bit for bit the stored one; logits unchanged",
    )


def test_a_wrong_block_would_be_seen():
    """The judge of this suite: a sound block that is another's is refused, a sound block with other states is wrong."""
    other = codec.encode(BlockKV(LAYOUT, 2, torch.ones(32)), key=key(1), fingerprint=FINGERPRINT, precision="float16")
    assert judge(1, block(1, IN_ROW), block(1, IN_ROW)) == "right"
    assert judge(1, None, block(1, IN_ROW)) == "missing"
    assert judge(1, block(2, IN_ROW), block(1, IN_ROW)) == "refused"
    assert judge(1, other, block(1, IN_ROW)) == "wrong"
