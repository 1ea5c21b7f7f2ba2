"""Blocks on their way to a prompt: threads share the work, requests share the blocks, failures hand them on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from test_exactness import QUERY, oracle_greedy, prompt_of

from blockrag.errors import StoreError, UnsafeStoreError
from blockrag.kernels.build import library, why_not
from blockrag.model import fetch as fetch_module
from blockrag.model.block_model import BlockModel
from blockrag.model.inflight import Flight, FlightKey, InFlight
from blockrag.model.readers import Dealer, Readers
from blockrag.model.sampling import GenerationOptions
from blockrag.stores import MemoryStore

Make = Callable[..., BlockModel]

LENGTHS = (7, 12, 9, 1, 30, 5, 8)
OPTIONS = GenerationOptions(max_new_tokens=6, ignore_eos=True)


@pytest.fixture
def several_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small blocks are worth a thread, and there are three."""
    if library() is None:
        pytest.skip(f"blocks are placed by one thread without compiled kernels: {why_not()}")
    monkeypatch.setattr(fetch_module, "_BYTES_PER_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


class GatedStore(MemoryStore):
    """A memory store whose reads wait until they are let through, and that notes who reads and writes what."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.asked = threading.Semaphore(0)
        self.read: list[str] = []
        self.readers: set[int] = set()
        self.written: list[str] = []
        self.fails = 0
        self.error: StoreError = StoreError("the medium is gone")

    def get_many(self, keys: Sequence[str]) -> Iterator[tuple[str, memoryview | None]]:
        self.asked.release()
        assert self.gate.wait(60)
        if self.fails:
            self.fails -= 1
            raise self.error
        self.read += keys
        self.readers.add(threading.get_ident())
        return super().get_many(keys)

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        self.written.append(key)
        super().put(key, data)


@pytest.mark.parametrize("case", ["llama", "mistral", "deepseek-v3"])
@pytest.mark.usefixtures("several_threads")
def test_threads_place_what_one_thread_places(make_model: Make, case: str) -> None:
    model = make_model(case, kept_bytes=0)
    store = GatedStore()
    prompt = prompt_of(LENGTHS, QUERY)
    model.generate(prompt, OPTIONS, store=store)
    again = model.generate(prompt, OPTIONS, store=store)
    assert list(again.token_ids) == oracle_greedy(model, prompt, 6)
    assert again.usage.blocks_reused == len(LENGTHS)
    assert sorted(store.read[len(LENGTHS) :]) == sorted(store.written), "each block is read once"


@pytest.mark.usefixtures("several_threads")
def test_one_block_is_placed_by_several_threads(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(kept_bytes=0)
    prompt = prompt_of((50,), QUERY)
    model.generate(prompt, OPTIONS)
    pieces: list[range | None] = []
    original = fetch_module.Fetch._place_in_layers

    def noting(self: fetch_module.Fetch, key: str, kv: object, threads: int) -> None:
        place = self.place

        def noted(places: Sequence[int], kv: object, layers: range | None = None, *, key: str) -> None:
            pieces.append(layers)
            place(places, kv, layers, key=key)  # type: ignore[arg-type]

        object.__setattr__(self, "place", noted)
        original(self, key, kv, threads)  # type: ignore[arg-type]

    monkeypatch.setattr(fetch_module.Fetch, "_place_in_layers", noting)
    answer = model.generate(prompt, OPTIONS)
    assert sorted((piece.start, piece.stop) for piece in pieces if piece is not None) == [(0, 1), (1, 2), (2, 4)]
    assert list(answer.token_ids) == oracle_greedy(model, prompt, 6)


@pytest.mark.usefixtures("several_threads")
def test_a_damaged_block_is_recomputed_whichever_thread_finds_it(make_model: Make) -> None:
    model = make_model(kept_bytes=0)
    store = GatedStore()
    prompt = prompt_of(LENGTHS, QUERY)
    model.generate(prompt, OPTIONS, store=store)
    for key in list(store.keys())[::2]:
        data = store.get(key)
        assert data is not None
        data[-1] ^= 1
    answer = model.generate(prompt, OPTIONS, store=store)
    assert answer.usage.blocks_damaged == 4
    assert answer.usage.blocks_computed == 4 + 1
    assert list(answer.token_ids) == oracle_greedy(model, prompt, 6)


@pytest.mark.usefixtures("several_threads")
def test_what_a_store_fails_to_read_is_computed_whichever_thread_finds_it(make_model: Make) -> None:
    model = make_model(kept_bytes=0)
    store = GatedStore()
    prompt = prompt_of(LENGTHS, QUERY)
    model.generate(prompt, OPTIONS, store=store)
    store.fails = 1
    answer = model.generate(prompt, OPTIONS, store=store)
    assert list(answer.token_ids) == oracle_greedy(model, prompt, 6)
    assert 0 < answer.usage.store_failures < len(LENGTHS), "the others have been read"
    assert answer.usage.blocks_computed == answer.usage.store_failures + 1
    answer = model.generate(prompt, OPTIONS, store=store)
    assert (answer.usage.blocks_reused, answer.usage.store_failures) == (len(LENGTHS), 0)


@pytest.mark.usefixtures("several_threads")
def test_an_unsafe_store_fails_the_request_and_not_the_next_one(make_model: Make) -> None:
    model = make_model(kept_bytes=0)
    store = GatedStore()
    prompt = prompt_of(LENGTHS, QUERY)
    model.generate(prompt, OPTIONS, store=store)
    store.fails, store.error = 1, UnsafeStoreError("a pickled row")
    with pytest.raises(UnsafeStoreError, match="a pickled row"):
        model.generate(prompt, OPTIONS, store=store)
    answer = model.generate(prompt, OPTIONS, store=store)
    assert list(answer.token_ids) == oracle_greedy(model, prompt, 6)
    assert answer.usage.blocks_reused == len(LENGTHS)


def answers_at_once(
    model: BlockModel, store: GatedStore, count: int, monkeypatch: pytest.MonkeyPatch
) -> list[list[int] | BaseException]:
    """The same prompt asked from several threads while the first of them is held up in the store."""
    prompt = prompt_of(LENGTHS, QUERY)
    store.gate.clear()
    boarded, board = threading.Semaphore(0), InFlight.board

    def noted(self: InFlight, keys: Iterable[FlightKey]) -> tuple[list[FlightKey], dict[FlightKey, Flight]]:
        flights = board(self, keys)
        boarded.release()
        return flights

    monkeypatch.setattr(InFlight, "board", noted)

    def ask() -> list[int] | BaseException:
        try:
            return list(model.generate(prompt, OPTIONS, store=store).token_ids)
        except StoreError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        first = pool.submit(ask)
        assert store.asked.acquire(timeout=60)
        others = [pool.submit(ask) for _ in range(count - 1)]
        for _ in range(count):
            assert boarded.acquire(timeout=60)
        # The others found nothing to be responsible for, so they never reach the store.
        assert not store.asked.acquire(blocking=False)
        store.gate.set()
        return [future.result(timeout=60) for future in (first, *others)]


@pytest.mark.parametrize("warm", [False, True], ids=["computing", "loading"])
def test_requests_at_the_same_time_load_and_compute_each_block_once(
    make_model: Make, monkeypatch: pytest.MonkeyPatch, warm: bool
) -> None:
    model = make_model(kept_bytes=0)
    store = GatedStore()
    right = oracle_greedy(model, prompt_of(LENGTHS, QUERY), 6)
    if warm:
        model.generate(prompt_of(LENGTHS, QUERY), OPTIONS, store=store)
        store.read.clear()
        while store.asked.acquire(blocking=False):
            pass
    assert answers_at_once(model, store, 4, monkeypatch) == [right] * 4
    assert len(store.read) == len(LENGTHS), "one request reads, the others are handed its blocks"
    assert len(store.written) == len(LENGTHS), "and each block is computed once"


def test_waiters_take_over_when_the_one_they_wait_for_fails(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(kept_bytes=0)
    store = GatedStore()
    store.fails, store.error = 1, UnsafeStoreError("a pickled row")
    first, *others = answers_at_once(model, store, 3, monkeypatch)
    assert isinstance(first, UnsafeStoreError)
    assert others == [oracle_greedy(model, prompt_of(LENGTHS, QUERY), 6)] * 2
    assert len(store.written) == len(LENGTHS)


def test_a_flight_is_boarded_once_and_lands_once() -> None:
    flights = InFlight()
    a, b, c = ((1, name) for name in "abc")
    mine, others = flights.board([a, b])
    assert (mine, others) == ([a, b], {})
    mine, others = flights.board([b, c])
    assert mine == [c]
    flights.land(b, None)
    assert others[b].wait() is None
    flights.land(b, None)
    assert flights.board([b])[0] == [b], "what has landed can be boarded again"


@pytest.mark.parametrize("readers", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 170])
def test_dealing_gives_every_item_once_and_small_pieces_last(readers: int, count: int) -> None:
    dealer = Dealer(range(count), readers)
    pieces = list(iter(dealer.take, range(count, count)))
    assert [item for piece in pieces for item in piece] == list(range(count))
    sizes = [len(piece) for piece in pieces]
    assert sizes == sorted(sizes, reverse=True)
    assert readers == 1 or count < 2 * readers or sizes[-1] == 1


def test_readers_run_everything_and_report_the_first_failure() -> None:
    readers, done = Readers(), []
    together = threading.Barrier(3, timeout=60)

    def meet(number: int) -> None:
        together.wait()
        done.append(number)

    readers.run([partial(meet, number) for number in range(3)])
    assert sorted(done) == [0, 1, 2]

    def fail(number: int) -> None:
        done.append(number)
        if number:
            raise ValueError(number)

    with pytest.raises(ValueError, match="1"):
        readers.run([partial(fail, number) for number in range(3)])
    assert sorted(done) == [0, 0, 1, 1, 2, 2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_readers_work_in_a_forked_process() -> None:
    readers = Readers()
    readers.run([lambda: None] * 2)
    child = os.fork()
    if child == 0:
        done: list[int] = []
        readers.run([partial(done.append, number) for number in range(2)])
        os._exit(0 if sorted(done) == [0, 1] else 1)
    assert os.waitpid(child, 0)[1] == 0
