"""Mutated blocks and mutated store directories: the reader refuses or answers right, and runs nothing meanwhile.

Run by `fresh`, which sees a crash; an alarm ends the process where a case hangs. The audit hook is on only while the
code under test runs.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import torch
import xxhash
from exercising import exercise, fill_and_die
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from index_fuzz_worker import Watch
from mutations import Mutation, mutated, mutations, random_mutation
from process_memory import forget_peak, resident

from blockrag import codec
from blockrag.errors import DamagedBlockError
from blockrag.kv import BlockKV, KVLayout, LayerShape

__all__ = ["fuzz_blocks", "fuzz_blocks_by_coverage", "fuzz_store"]

_KEY, _FINGERPRINT = "ab" * 32, "cd" * 16
_LAYOUT = KVLayout((LayerShape(2, 4, 2, 4), LayerShape(1, 6, 3, 2)))
_PRECISIONS: tuple[codec.Precision, ...] = ("float32", "bfloat16", "float16", "int8", "int4")
_SPARE_BYTES = 256 << 10
_HANG_S = 20
_NOWHERE = Path("/nowhere")


def _sound_blocks() -> list[bytes]:
    kv = BlockKV(_LAYOUT, 5, torch.randn(5 * _LAYOUT.elements_per_token, generator=torch.Generator().manual_seed(1)))
    return [bytes(codec.encode(kv, key=_KEY, fingerprint=_FINGERPRINT, precision=name)) for name in _PRECISIONS]


def _with_checksum(data: bytes) -> bytes:
    """The bytes with a checksum that is right, as a forger would leave them."""
    if len(data) < 32:
        return data
    return data[:16] + xxhash.xxh3_128_digest(data[:16] + data[32:]) + data[32:]


class BlockReader:
    """Reads one block after another, and keeps what must not happen.

    Args:
        sound: The blocks that are sound.
    """

    def __init__(self, sound: list[bytes]) -> None:
        self.counts: Counter[str] = Counter()
        self._sound = {bytes(data) for data in sound}
        self._watch = Watch()
        # Everything that is imported or compiled late is there before anybody looks.
        for data in (*sound, sound[0][:-1]):
            self._read(data)
        self.counts.clear()
        sys.addaudithook(self._watch)

    def __call__(self, data: bytes, *, forged: bool) -> None:
        """Read a block; one that is not sound must be refused, unless its checksum was forged."""
        signal.alarm(_HANG_S)
        tracemalloc.start()
        self._watch.directory = _NOWHERE
        outcome = self._read(data)
        self._watch.directory = None
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        signal.alarm(0)
        assert not self._watch.seen, f"reading a block ran {self._watch.seen}"
        assert peak <= 2 * len(data) + _SPARE_BYTES, f"{peak} bytes for a block of {len(data)}"
        assert forged or outcome != "read" or data in self._sound, "a damaged block was taken for a sound one"
        self.counts[outcome] += 1
        self.counts["blocks"] += 1

    def _read(self, data: bytes) -> str:
        try:
            codec.read_header(data)
            kv = codec.decode(bytearray(data), key=_KEY, fingerprint=_FINGERPRINT, layout=_LAYOUT)
            for layer in range(_LAYOUT.num_layers):
                kv.keys(layer)
                kv.values(layer)
        except DamagedBlockError as error:
            return error.reason
        return "read"


def fuzz_blocks(cases: int) -> dict[str, int]:
    """Mutated blocks of every precision, half of them with their checksum made right, and bytes that were none.

    Returns:
        "blocks", and how many were "read" or refused for which reason.
    """
    sound = _sound_blocks()
    read = BlockReader(sound)
    thorough = settings(max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck), database=None)

    @thorough
    @given(st.sampled_from(sound), mutations(), st.booleans())
    def of_blocks(data: bytes, changes: list[Mutation], forged: bool) -> None:
        data = mutated(data, changes)
        read(_with_checksum(data) if forged else data, forged=forged)

    @settings(thorough, max_examples=cases // 10)
    @given(st.binary(max_size=400), st.booleans())
    def of_anything(data: bytes, magic: bool) -> None:
        read(sound[0][:12] + data if magic else data, forged=False)

    of_blocks()
    of_anything()
    return dict(read.counts)


def fuzz_blocks_by_coverage(seconds: int, corpus: str) -> dict[str, int]:
    """The same led by what of the codec was reached, with atheris (libFuzzer). Returns "blocks"."""
    import atheris

    sound = _sound_blocks()
    Path(corpus).mkdir()
    for number, data in enumerate(sound):
        (Path(corpus) / str(number)).write_bytes(data)
    child = os.fork()
    if not child:
        log = os.open(f"{corpus}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 2)
        read = BlockReader(sound)
        for name in ("_parse", "_view", "_tensor_over", "_as_bytes", "decode", "read_header"):
            setattr(codec, name, atheris.instrument_func(getattr(codec, name)))

        def one(data: bytes) -> None:
            # Without a checksum that is right, no fuzzer gets past the first line.
            read(_with_checksum(data), forged=True)
            read(data, forged=False)

        options = [f"-max_total_time={seconds}", "-print_final_stats=1", "-max_len=2048", f"-rss_limit_mb={4096}"]
        atheris.Setup(["codec", *options, corpus], one)
        atheris.Fuzz()
    _, status = os.waitpid(child, 0)
    log_text = Path(f"{corpus}.log").read_text(errors="replace")
    assert status == 0, log_text[-3000:]
    found = re.search(r"number_of_executed_units: (\d+)", log_text)
    assert found is not None, log_text[-1000:]
    return {"blocks": int(found[1])}


def fuzz_store(directory: str, cases: int, seed: int) -> dict[str, int]:
    """Mutated files of a store, one or two at a time: open, read, check and write each time.

    Returns:
        What `exercise` counts, "stores", and "grown KiB": by how much the peak of this process's memory grew.
    """
    root, sound_root = Path(directory) / "s", Path(directory) / "sound"
    fill_and_die(sound_root)
    names = sorted(str(path.relative_to(sound_root)) for path in sound_root.rglob("*") if path.is_file())
    assert len(names) > 5, names
    counts: Counter[str] = Counter()
    watch = Watch()
    random_numbers = random.Random(seed)

    def run(changes: dict[str, list[Mutation]]) -> None:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(sound_root, root)
        for name, some in changes.items():
            (root / name).write_bytes(mutated((root / name).read_bytes(), some))
        watch.directory = root
        exercise(root, counts)
        watch.directory = None
        assert not watch.seen, f"{changes}: opening a store ran {watch.seen}"

    # Refusals import and format things too.
    run({})
    run({"cache.db": [Mutation("fill", 0, 0, 100, 0)]})
    counts.clear()
    forget_peak()
    before = resident("VmHWM")
    sys.addaudithook(watch)
    for _ in range(cases):
        chosen = random_numbers.sample(names, random_numbers.choice((1, 1, 2)))
        run({name: [random_mutation(random_numbers) for _ in range(random_numbers.randint(1, 3))] for name in chosen})
        counts["stores"] += 1
    grown = (resident("VmHWM") - before) >> 10
    size = sum((sound_root / name).stat().st_size for name in names)
    return {**counts, "grown KiB": grown, "size KiB": size >> 10}
