"""Flips single bits of a store's files and looks at what its readers get; run in a process of its own by `fresh`."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from blocks import HEADER_BYTES, IN_FILE, LAYOUT, block, judge, key, locate
from exercising import IN_FILES, exercise, fill_and_die, index_files, restore, small_files

from blockrag import codec
from blockrag.stores import DiskStore

__all__ = ["flip_blocks", "flip_index"]


def flip_blocks(directory: str, flips: int, seed: int) -> dict[str, int]:
    """Every bit of a block's header, then random bits of payloads, each in the file of a store that is open.

    Returns:
        How many reads gave what, "healed" for blocks that were right once the bit was flipped back, and "unchecked"
        for payload flips that a reader without the checksum takes for a good block: the control.
    """
    random_numbers = random.Random(seed)
    counts: Counter[str] = Counter()
    with contextlib.closing(DiskStore(directory)) as store:
        for number in range(IN_FILES):
            store.put(key(number), block(number, IN_FILE))
        places = [locate(Path(directory), block(number, IN_FILE)) for number in range(IN_FILES)]
        for flip in range(flips):
            number = flip % IN_FILES
            in_header = flip < HEADER_BYTES * 8
            bit = flip if in_header else random_numbers.randrange(HEADER_BYTES * 8, IN_FILE * 8)
            path, offset = places[number]
            with _flipped(path, offset * 8 + bit):
                found = store.get(key(number))
                counts[judge(number, found, block(number, IN_FILE))] += 1
                if not in_header and found is not None:
                    codec.view_encoded(bytearray(found), layout=LAYOUT)
                    counts["unchecked"] += 1
            counts["healed"] += judge(number, store.get(key(number)), block(number, IN_FILE)) == "right"
    return dict(counts)


def flip_index(directory: str, flips: int, seed: int) -> dict[str, int]:
    """Random bits of the index, and of the write-ahead log of a killed writer: open, read, check and write each time.

    Returns:
        How many "reads" there were and how many gave what; "refused to open", "refused to read", "refused to write" for
        typed errors.
    """
    root = Path(directory)
    fill_and_die(root)
    sound = small_files(root)
    targets = index_files(sound)
    random_numbers = random.Random(seed)
    counts: Counter[str] = Counter()
    for flip in range(flips):
        target = targets[flip % 2]
        data = bytearray(sound[target])
        bit = random_numbers.randrange(len(data) * 8)
        data[bit // 8] ^= 1 << bit % 8
        restore(root, {**sound, target: bytes(data)})
        exercise(root, counts)
    return dict(counts)


@contextlib.contextmanager
def _flipped(path: Path, bit: int) -> Iterator[None]:
    def flip() -> None:
        with path.open("r+b", buffering=0) as file:
            file.seek(bit // 8)
            (byte,) = file.read(1)
            file.seek(bit // 8)
            file.write(bytes([byte ^ 1 << bit % 8]))

    flip()
    try:
        yield
    finally:
        flip()
