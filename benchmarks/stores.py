"""The disk store against a plain directory: one file per block, named by its key, written beside and renamed.

    python benchmarks/stores.py --out DIR

The directory is the least that a content-addressed store could be, written here for the comparison: no index, no
budget, no order of use, no check of what it finds but its length. Both hold the same encoded blocks, tiny ones and
large ones, and take turns at every operation, portion by portion, so that no slow minute falls on one of them; a ratio
is of the two times of one portion. All files are in the page cache. Nothing is synchronized by either.

A second part asks whether mapping a file pays: the path of a block from the file to its place in a prompt's cache
(checksum, decoding, placing) with the file read into reused memory, and with the file mapped.

Writes `DIR/stores.json` and `DIR/stores.md`; the stores themselves go to a temporary directory beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import random
import shutil
import sqlite3
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

from blockrag import codec
from blockrag.evaluation.speed.frame import spread
from blockrag.evaluation.speed.machine import commit, describe_machine, filesystem_of, load_average, versions
from blockrag.evaluation.speed.text import size, table
from blockrag.kernels.place import CompiledPlacement, Rows
from blockrag.kv import BlockKV, KVLayout, LayerShape
from blockrag.rope import RopeSpec
from blockrag.stores.disk import DiskStore
from blockrag.stores.disk.values import Buffer

TINY = KVLayout((LayerShape(1, 16, 1, 16),))
"""9 tokens in 16 bit make 704 bytes."""
LARGE = KVLayout((LayerShape(8, 64, 8, 64),) * 16)
"""The shapes of Llama 3.2 1B: 32 KiB a token in 16 bit."""
TINY_TOKENS, LARGE_TOKENS = (9, 9), (32, 128)
FINGERPRINT = "0" * 32
PROMPT_BLOCKS = 20
OPERATIONS = ("put", "get", "get_many", "contains_many", "keys", "delete_many")
WAYS = ("DiskStore", "directory")
HEADER = struct.Struct("<12xI72xQ")
"""Header bytes and payload bytes of an encoded block."""


class Store(Protocol):
    """What is measured of both, as `blockrag.stores.BlockStore` has it."""

    def get(self, key: str) -> memoryview | None:
        """One block."""

    def get_many(self, keys: Sequence[str]) -> Iterator[tuple[str, memoryview | None]]:
        """A prompt's blocks."""

    def put(self, key: str, data: bytearray) -> None:
        """One block more."""

    def contains_many(self, keys: Sequence[str]) -> set[str]:
        """What is there of them."""

    def keys(self) -> Iterator[str]:
        """All."""

    def delete_many(self, keys: Sequence[str]) -> int:
        """Remove some."""


class PlainDirectory:
    """Blocks as files `ab/<62 hex digits>`."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        for number in range(256):
            os.makedirs(f"{self._root}/{number:02x}", exist_ok=True)  # noqa: PTH103 - as fast as it can be

    def path(self, key: str) -> str:
        """Where a block is."""
        return f"{self._root}/{key[:2]}/{key[2:]}"

    def get(self, key: str) -> memoryview | None:
        """The block over fresh memory, if it has the length that its header says."""
        return self.read(key, Buffer())

    def get_many(self, keys: Sequence[str]) -> Iterator[tuple[str, memoryview | None]]:
        """Each block over the same memory, unless the caller keeps it."""
        buffer = Buffer()
        return ((key, self.read(key, buffer)) for key in keys)

    def read(self, key: str, buffer: Buffer) -> memoryview | None:
        """The block over a buffer."""
        try:
            handle = os.open(self.path(key), os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            view = buffer.take(os.fstat(handle).st_size)
            return view if os.preadv(handle, [view], 0) == len(view) and _whole(view) else None
        finally:
            os.close(handle)

    def mapped(self, key: str) -> memoryview | None:
        """The block over the file itself; private, as a tensor over it wants it writable."""
        handle = os.open(self.path(key), os.O_RDONLY)
        try:
            view = memoryview(mmap.mmap(handle, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE))
            return view if _whole(view) else None
        finally:
            os.close(handle)

    def put(self, key: str, data: bytearray) -> None:
        """Write beside, then rename."""
        path = self.path(key)
        beside = f"{path}.{os.urandom(8).hex()}"
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            if os.write(handle, data) != len(data):
                raise OSError("a short write")
        finally:
            os.close(handle)
        os.replace(beside, path)  # noqa: PTH105 - as fast as it can be

    def contains_many(self, keys: Sequence[str]) -> set[str]:
        """One look for each."""
        return {key for key in keys if os.path.exists(self.path(key))}  # noqa: PTH110 - as fast as it can be

    def keys(self) -> Iterator[str]:
        """List all directories."""
        for folder in os.listdir(self._root):  # noqa: PTH208 - as fast as it can be
            yield from (folder + name for name in os.listdir(f"{self._root}/{folder}"))  # noqa: PTH208

    def delete_many(self, keys: Sequence[str]) -> int:
        """One removal for each."""
        for key in keys:
            os.unlink(self.path(key))  # noqa: PTH108 - as fast as it can be
        return len(keys)


def main() -> int:
    """Measure, write both files and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory")
    parser.add_argument("--tiny", type=int, default=100_000, help="tiny blocks, about 700 bytes (100000)")
    parser.add_argument("--large", type=int, default=1000, help="large blocks, 1 to 4 MB (1000)")
    parser.add_argument("--portions", type=int, default=50, help="portions of each operation (50)")
    parser.add_argument("--rounds", type=int, default=10, help="how often stores are opened and listed (10)")
    parser.add_argument("--seed", type=int, default=0, help="draws keys, contents and lengths")
    parser.add_argument("--note", default="", help="kept with the result")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    result = {
        "schema": 1,
        "benchmark": "stores",
        "command": f"python benchmarks/stores.py --tiny {arguments.tiny} --large {arguments.large}"
        f" --portions {arguments.portions} --rounds {arguments.rounds} --seed {arguments.seed}",
        "note": arguments.note,
        **commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "versions": {**versions(), "diskcache": version("diskcache"), "sqlite": sqlite3.sqlite_version},
        "machine": describe_machine("cpu"),
        "filesystem": filesystem_of(arguments.out),
        "load_average_before": load_average(),
    }
    draw = random.Random(arguments.seed)
    for name, count, layout, tokens in (
        ("tiny", arguments.tiny, TINY, TINY_TOKENS),
        ("large", arguments.large, LARGE, LARGE_TOKENS),
    ):
        with tempfile.TemporaryDirectory(dir=arguments.out) as scratch:
            blocks = Blocks(count, layout, tokens, draw)
            if blocks.nbytes * 3 > shutil.disk_usage(scratch).free:
                parser.error(f"{name} blocks take {size(blocks.nbytes)} twice, which this disk has no room for")
            result[name] = measure(blocks, Path(scratch), arguments.portions, arguments.rounds)
    result["load_average_after"] = load_average()
    (arguments.out / "stores.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", "utf-8")
    text = markdown(result)
    (arguments.out / "stores.md").write_text(text, "utf-8")
    print(text)
    return 0


class Blocks:
    """Encoded blocks, made when they are needed: large ones would not fit in memory.

    Args:
        count: How many.
        layout: Of all.
        tokens: Least and most of one.
        draw: Draws keys and lengths.
    """

    def __init__(self, count: int, layout: KVLayout, tokens: tuple[int, int], draw: random.Random) -> None:
        self.layout = layout
        self._tokens = {f"{draw.getrandbits(256):064x}": draw.randint(*tokens) for _ in range(count)}
        self.keys = list(self._tokens)
        generator = torch.Generator().manual_seed(draw.getrandbits(32))
        self._numbers = torch.randn(layout.elements_per_token * tokens[1], generator=generator).to(torch.bfloat16)
        self.nbytes = sum(codec.encoded_nbytes(layout, one, "bfloat16") for one in self._tokens.values())

    def encoded(self, key: str) -> bytearray:
        """One of them."""
        tokens = self._tokens[key]
        kv = BlockKV(self.layout, tokens, self._numbers[: self.layout.elements_per_token * tokens])
        return codec.encode(kv, key=key, fingerprint=FINGERPRINT, precision="bfloat16")


def measure(blocks: Blocks, scratch: Path, portions: int, rounds: int) -> dict[str, Any]:
    """All operations on one kind of blocks."""
    disk = DiskStore(scratch / "disk")
    directory = PlainDirectory(scratch / "directory")
    stores: dict[str, Store] = {"DiskStore": disk, "directory": directory}
    draw = random.Random(1)
    keys = blocks.keys
    per_portion = max(1, len(keys) // portions)
    read = min(per_portion, 200)
    times: dict[str, dict[str, list[float]]] = {name: {way: [] for way in WAYS} for name in OPERATIONS}

    def turn(operation: str, number: int, run: Callable[[Store], object], items: int) -> None:
        # Seconds per block; who begins changes, as the second may find the processor's cache warm.
        for way in WAYS if number % 2 else WAYS[::-1]:
            started = time.perf_counter()
            run(stores[way])
            times[operation][way].append((time.perf_counter() - started) / items)

    for number in range(portions):
        portion = keys[number * per_portion : (number + 1) * per_portion]
        encoded = [(key, blocks.encoded(key)) for key in portion]
        turn("put", number, lambda store, encoded=encoded: [store.put(*one) for one in encoded], len(portion))
    stored = keys[: portions * per_portion]
    _say(f"put {len(stored)} blocks")
    for number in range(portions):
        some = draw.sample(stored, read)
        turn("get", number, lambda store, some=some: [store.get(key) for key in some], len(some))
        prompt = draw.sample(stored, min(PROMPT_BLOCKS, len(stored)))
        turn("get_many", number, lambda store, some=prompt: _drain(store, some), len(prompt))
        asked = [*draw.sample(stored, read), *(f"{draw.getrandbits(256):064x}" for _ in range(read))]
        turn("contains_many", number, lambda store, asked=asked: store.contains_many(asked), len(asked))
    opened = {way: [] for way in WAYS}
    for number in range(rounds):
        turn("keys", number, lambda store: sum(1 for _ in store.keys()), len(stored))  # noqa: SIM118 - no dictionary
        disk.close()
        started = time.perf_counter()
        stores["DiskStore"] = disk = DiskStore(scratch / "disk")
        opened["DiskStore"].append(time.perf_counter() - started)
    result: dict[str, Any] = {
        "blocks": len(stored),
        "bytes": blocks.nbytes,
        "open_s": spread(opened["DiskStore"]),
        "space": {way: _space(scratch / name) for way, name in zip(WAYS, ("disk", "directory"), strict=True)},
        "verify_s": _seconds(disk.verify),
    }
    if blocks.layout is LARGE:
        result["path"] = measure_path(blocks, directory, stored, portions)
    for number in range(portions):
        portion = keys[number * per_portion : (number + 1) * per_portion]
        turn("delete_many", number, lambda store, portion=portion: store.delete_many(portion), len(portion))
    disk.close()
    result["operations"] = {
        name: {
            **{way: spread(times[name][way]) for way in WAYS},
            "ratio": spread([one / other for one, other in zip(*times[name].values(), strict=True)]),
        }
        for name in OPERATIONS
    }
    return result


def measure_path(blocks: Blocks, directory: PlainDirectory, stored: Sequence[str], portions: int) -> dict[str, Any]:
    """Seconds per byte from the file into a prompt's cache, by reading and by mapping."""
    draw = random.Random(2)
    tokens = PROMPT_BLOCKS * LARGE_TOKENS[1]
    rope = RopeSpec("half", 0, 64, tuple(10000 ** (-index / 32) for index in range(32)))
    rows = [
        Rows(torch.zeros(8, tokens, 64), 0, rope if index % 2 == 0 else RopeSpec())
        for index in range(2 * blocks.layout.num_layers)
    ]
    placement = CompiledPlacement.of(rows, tokens)
    times: dict[str, list[float]] = {"read": [], "mapped": []}
    for number in range(portions if placement is not None else 0):
        prompt = draw.sample(stored, min(PROMPT_BLOCKS, len(stored)))
        for way in ("read", "mapped") if number % 2 else ("mapped", "read"):
            buffer, start, nbytes = Buffer(), 0, 0
            started = time.perf_counter()
            for key in prompt:
                data = directory.read(key, buffer) if way == "read" else directory.mapped(key)
                if data is None:
                    raise RuntimeError(f"block {key} is gone")
                kv = codec.decode(data, key=key, fingerprint=FINGERPRINT, layout=blocks.layout)
                placement.place(kv, start, range(blocks.layout.num_layers))
                start += kv.num_tokens
                nbytes += len(data)
                del data, kv
            times[way].append((time.perf_counter() - started) / nbytes)
    if placement is None:
        return {}
    ratios = [mapped / read for read, mapped in zip(times["read"], times["mapped"], strict=True)]
    return {**{way: spread(samples) for way, samples in times.items()}, "ratio": spread(ratios)}


def markdown(result: dict[str, Any]) -> str:
    """The tables."""
    lines = [
        "# The disk store against a plain directory",
        "",
        f"`{result['command']}`, {result['machine']['cpu']}, {result['machine']['cores']} cores, "
        f"{result['filesystem']}, load average {result['load_average_before']} before and "
        f"{result['load_average_after']} after. {result['note']}".rstrip(),
        "",
        "Microseconds per block: the median of the portions and the middle half of them. A ratio is DiskStore's time "
        "over the directory's for the same portion; n portions.",
    ]
    for kind in ("tiny", "large"):
        one = result[kind]
        nbytes = one["bytes"]
        rows = [
            [f"`{name}`", *(_micros(measured[way]) for way in WAYS), _ratio(measured["ratio"])]
            for name, measured in one["operations"].items()
        ]
        lines += [
            "",
            f"## {one['blocks']:,} {kind} blocks, {size(nbytes)}",
            "",
            table(["", *WAYS, "ratio"], rows),
            "",
            f"Opening DiskStore takes {one['open_s']['median']:.3f} s (at most {one['open_s']['max']:.3f}), verifying "
            f"it {one['verify_s']:.1f} s. On the disk: "
            + ", ".join(
                f"{way} {size(space)} ({space / nbytes:.2f} times the blocks)" for way, space in one["space"].items()
            )
            + ".",
        ]
    if path := result["large"].get("path"):
        rows = [[way, f"{1e-9 / path[way]['median']:.2f} GB/s"] for way in ("read", "mapped")]
        lines += [
            "",
            "## From the file into a prompt's cache, one thread",
            "",
            table(["", "rate"], rows),
            "",
            f"Mapping takes {_ratio(path['ratio'])} times as long as reading into reused memory.",
        ]
    return "\n".join(lines) + "\n"


def _micros(measured: dict[str, Any]) -> str:
    lower, _, upper = statistics.quantiles(measured["samples"], n=4, method="inclusive")
    return f"**{measured['median'] * 1e6:,.1f}** ({lower * 1e6:,.1f} to {upper * 1e6:,.1f})"


def _ratio(measured: dict[str, Any]) -> str:
    lower, _, upper = statistics.quantiles(measured["samples"], n=4, method="inclusive")
    return f"**{measured['median']:.2f}** ({lower:.2f} to {upper:.2f}), n = {measured['n']}"


def _whole(view: memoryview) -> bool:
    return len(view) >= HEADER.size and sum(HEADER.unpack_from(view)) == len(view)


def _drain(store: Store, keys: Sequence[str]) -> None:
    for _ in store.get_many(keys):
        pass


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _space(root: Path) -> int:
    """Bytes of the disk that a directory's files take."""
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(f"{folder}/{name}").st_blocks * 512
    return total


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
