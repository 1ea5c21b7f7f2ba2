"""Tenants in one store: nobody finds another's blocks, and the time to the first token says nothing about them."""

from __future__ import annotations

import random
import time

import pytest

from blockrag.model.block_model import BlockModel
from blockrag.model.sampling import GenerationOptions
from blockrag.prompt import Block, SegmentedPrompt
from blockrag.stores import MemoryStore

OPTIONS = GenerationOptions(max_new_tokens=1, ignore_eos=True)
# Names that somebody might take for each other.
NAMES = ["", "a", "A", "b", "ab", "a/b", "a\0b", "\0", " ", "a ", "é", "e\u0301", "0" * 64, "a" * 10_000, "../a", "a\n"]
PASSAGES, TOKENS = 2, 64
ROUND = 25


@pytest.fixture(scope="module")
def model():
    return BlockModel.from_pretrained("demo", device="cpu", store=MemoryStore(), kept_bytes=0)


def passage(model: BlockModel, numbers: random.Random, tokens: int = TOKENS) -> Block:
    ids = tuple(numbers.randrange(10, len(model.tokenizer)) for _ in range(tokens))
    return Block(ids, "", local=True, kind="passage")


def prompt(model: BlockModel, numbers: random.Random) -> SegmentedPrompt:
    """Random passages that nobody else has, and a question."""
    question = Block(passage(model, numbers, 8).token_ids, "", local=False, kind="query")
    return SegmentedPrompt((*(passage(model, numbers) for _ in range(PASSAGES)), question))


def test_no_probe_finds_another_namespaces_block(model, scale, record):
    probes = scale(ci=2_000, long=100_000)
    numbers = random.Random(3)
    views = {name: model.in_namespace(name) for name in NAMES}
    blocks = [passage(model, numbers, 1 + number % 7) for number in range(20)]
    stored = {}
    for name, view in views.items():
        view.materialize(blocks)
        stored[name] = {view.block_key(block.token_ids) for block in blocks}
    everything = set(model.store.keys())
    assert len(everything) == sum(map(len, stored.values())), "no two names have a key in common"
    hits = own = 0
    for probe in range(probes):
        owner, prober = numbers.sample(NAMES, 2)
        block = numbers.choice(blocks)
        key = views[prober].block_key(block.token_ids)
        hits += key in stored[owner]
        own += key in stored[prober]
        if probe % 100 == 0:
            # The same through the store, for a name nobody has used.
            stranger = model.in_namespace(f"stranger {probe}")
            hits += len(model.store.contains_many([stranger.block_key(block.token_ids) for block in blocks]))
    assert hits == 0
    assert own == probes, "the control: everybody finds their own"
    record(
        "probes for another namespace's blocks",
        tried=probes,
        unit="probes",
        result=f"0 hits among {len(NAMES)} names; all find their own",
    )
    model.store.delete_many(everything)


@pytest.mark.timeout(3600)
def test_the_first_token_does_not_tell_what_others_have_stored(model, scale, record):
    """A classifier of prompts by their time to the first token: chance between namespaces, certain inside one.

    By the clock on the wall, which is what somebody outside sees, and by processor time, from which the noise of
    whatever else runs here is gone: the sharper eye.
    """
    count, few = scale(ci=200, long=2_000), scale(ci=50, long=500)
    # With n and n prompts chance has a standard error of 0.41 / sqrt(n): 0.029 for 200, 0.009 for 2,000.
    margin = scale(ci=0.15, long=0.05)
    across, work = _classified(model, model.in_namespace("victim"), model.in_namespace("attacker"), count, seed=5)
    inside, control = _classified(model, model.in_namespace("one"), model.in_namespace("one"), few, seed=6)
    result = (
        f"AUC {across['wall']:.3f} by the clock and {across['processor']:.3f} by processor time for blocks of another "
        f"namespace (chance 0.5); {inside['wall']:.3f} and {inside['processor']:.3f} for one's own"
    )
    # What does not depend on a clock at all.
    assert work == {(0, PASSAGES + 1)}
    assert control == {(0, PASSAGES + 1), (PASSAGES, 1)}
    assert inside["processor"] >= 0.95, result
    assert all(abs(auc - 0.5) <= margin for auc in across.values()), result
    record("a classifier by time to the first token", tried=2 * (count + few), unit="prompts", result=result)


def _classified(model, owner, prober, count, *, seed):
    """How well prompts whose passages the owner has stored are told from others, by the time the prober is answered.

    Returns:
        The area under the classifier's curve by each clock, 0.5 for chance; and what the answers counted: blocks
        reused and computed.
    """
    numbers = random.Random(seed)
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    spent = {name: {True: [], False: []} for name in clocks}
    counted = set()
    prober.generate(prompt(model, numbers), OPTIONS)
    for start in range(0, count, ROUND):
        size = min(ROUND, count - start)
        questions = [(prompt(model, numbers), is_stored) for is_stored in (True, False) for _ in range(size)]
        owner.materialize([block for one, is_stored in questions if is_stored for block in one.local_blocks])
        # In turn, so that a machine that is busy for a while is busy for both.
        numbers.shuffle(questions)
        for one, is_stored in questions:
            started = {name: clock() for name, clock in clocks.items()}
            usage = prober.generate(one, OPTIONS).usage
            for name, clock in clocks.items():
                spent[name][is_stored].append(clock() - started[name])
            counted.add((usage.blocks_reused, usage.blocks_computed))
        model.store.delete_many(list(model.store.keys()))
    return {name: _auc(seconds[True], seconds[False]) for name, seconds in spent.items()}, counted


def _auc(stored, unknown):
    """The chance that a stored prompt is answered faster than an unknown one; ties count half."""
    faster = sum((b > a) + 0.5 * (b == a) for a in stored for b in unknown)
    return faster / (len(stored) * len(unknown))
