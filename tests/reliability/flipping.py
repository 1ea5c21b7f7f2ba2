"""Flips single bits of a store's files and looks at what its readers get; run in a process of its own by `fresh`."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from blocks import HEADER_BYTES, IN_FILE, IN_ROW, LAYOUT, block, judge, key, locate

from blockrag import codec
from blockrag.errors import StoreError
from blockrag.stores import DiskStore

__all__ = ["flip_blocks", "flip_index"]

_IN_FILES = 4
_IN_ROWS = 24
_HANG_S = 10


def flip_blocks(directory: str, flips: int, seed: int) -> dict[str, int]:
    """Every bit of a block's header, then random bits of payloads, each in the file of a store that is open.

    Returns:
        How many reads gave what, "healed" for blocks that were right once the bit was flipped back, and "unchecked"
        for payload flips that a reader without the checksum takes for a good block: the control.
    """
    random_numbers = random.Random(seed)
    counts: Counter[str] = Counter()
    with contextlib.closing(DiskStore(directory)) as store:
        for number in range(_IN_FILES):
            store.put(key(number), block(number, IN_FILE))
        places = [locate(Path(directory), block(number, IN_FILE)) for number in range(_IN_FILES)]
        for flip in range(flips):
            number = flip % _IN_FILES
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
    _fill_and_die(root)
    sound = {path: path.read_bytes() for path in sorted(root.iterdir()) if path.is_file()}
    targets = [path for path in sound if "cache.db" in path.name and not path.name.endswith("-shm")]
    assert len(targets) == 2, f"an index and its write-ahead log, found {targets}"
    random_numbers = random.Random(seed)
    counts: Counter[str] = Counter()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for flip in range(flips):
        target = targets[flip % 2]
        data = bytearray(sound[target])
        bit = random_numbers.randrange(len(data) * 8)
        data[bit // 8] ^= 1 << bit % 8
        _restore(root, {**sound, target: bytes(data)})
        # A reader that hangs ends the process.
        signal.alarm(_HANG_S)
        _exercise(root, counts)
        signal.alarm(0)
    return dict(counts)


def _exercise(root: Path, counts: Counter[str]) -> None:
    try:
        store = DiskStore(root, max_bytes=10_000_000)
    except StoreError:
        counts["refused to open"] += 1
        return
    with contextlib.closing(store):
        for number in range(_IN_FILES + _IN_ROWS):
            counts["reads"] += 1
            with _typed(counts, "refused to read"):
                size = IN_FILE if number < _IN_FILES else IN_ROW
                counts[judge(number, store.get(key(number)), block(number, size))] += 1
        with _typed(counts, "refused to read"):
            counts["listed"] += len(list(store.keys()))
        with _typed(counts, "refused to check"):
            store.verify()
        with _typed(counts, "refused to write"):
            store.put(key(1000), block(1000, IN_ROW))
            counts[f"written block {judge(1000, store.get(key(1000)), block(1000, IN_ROW))}"] += 1


@contextlib.contextmanager
def _typed(counts: Counter[str], name: str) -> Iterator[None]:
    """The store's own errors count as refusals; any other ends the process."""
    try:
        yield
    except StoreError:
        counts[name] += 1


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


def _fill_and_die(root: Path) -> None:
    """Half of the blocks by a writer that closes the store, half by one that is killed and leaves its log behind."""
    for first, die in ((0, False), (1, True)):
        child = os.fork()
        if not child:
            store = DiskStore(root)
            for number in range(first, _IN_FILES + _IN_ROWS, 2):
                store.put(key(number), block(number, IN_FILE if number < _IN_FILES else IN_ROW))
            if die:
                os.kill(os.getpid(), signal.SIGKILL)
            store.close()
            os._exit(0)
        os.waitpid(child, 0)


def _restore(root: Path, files: dict[Path, bytes]) -> None:
    for path in root.iterdir():
        if path.is_file() and path not in files:
            path.unlink()
    for path, data in files.items():
        path.write_bytes(data)
