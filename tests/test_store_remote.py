"""How a store deals with a server: deadlines, the breaker, and what is never done at reading."""

from __future__ import annotations

import threading
import time

import pytest
from reliability.blocks import block, key

from blockrag.errors import InputError, StoreError, StoreFullError
from blockrag.stores.breaker import Breaker
from blockrag.stores.remote import Explained, Remote


class Clock:
    """A clock that the test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class TestBreaker:
    @pytest.fixture
    def clock(self):
        return Clock()

    @pytest.fixture
    def breaker(self, clock):
        return Breaker("server", clock)

    def test_five_failures_in_a_row_open_it(self, breaker, caplog):
        for _ in range(4):
            assert breaker.allows()
            breaker.failed()
        assert breaker.allows()
        assert breaker.shaken
        assert not caplog.messages
        breaker.failed()
        assert not breaker.allows()
        assert caplog.messages == [
            "server failed 5 times in a row; what it keeps is missing until it answers, asked again every 10 s"
        ]

    def test_a_failure_is_forgotten_in_time(self, breaker, clock):
        breaker.failed()
        clock.now = 9.9
        assert breaker.shaken
        clock.now = 10.0
        assert not breaker.shaken
        assert breaker.allows()

    def test_a_success_between_starts_the_count_anew(self, breaker):
        for _ in range(3):
            for _ in range(4):
                breaker.failed()
            breaker.succeeded()
            assert not breaker.shaken
        assert breaker.allows()

    def test_after_a_pause_one_request_tries(self, breaker, clock, caplog):
        for _ in range(8):
            breaker.failed()
        clock.now = 9.9
        assert not breaker.allows()
        clock.now = 10.0
        assert [breaker.allows() for _ in range(3)] == [True, False, False]
        breaker.failed()
        clock.now = 19.9
        assert not breaker.allows()
        clock.now = 20.0
        assert breaker.allows()
        breaker.succeeded()
        assert all(breaker.allows() for _ in range(3))
        assert caplog.messages[-1] == "server answers again"

    def test_a_trial_without_an_outcome_does_not_block_the_next(self, breaker, clock):
        for _ in range(5):
            breaker.failed()
        clock.now = 10.0
        assert breaker.allows()
        clock.now = 20.0
        assert breaker.allows()


class Server:
    """A server in this process, behind the calls a client library would make: keeps blocks, and waits or fails."""

    def __init__(self) -> None:
        self.blocks: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.error: Exception | None = None
        self.running = self.most_running = 0
        self.go = threading.Event()
        self.go.set()
        self._lock = threading.Lock()

    def fetch(self, name: str) -> memoryview | None:
        with self._lock:
            self.asked.append(name)
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            assert self.go.wait(20)
            if self.error is not None:
                raise self.error
            data = self.blocks.get(name)
            return None if data is None else memoryview(data)
        finally:
            with self._lock:
                self.running -= 1


@pytest.fixture
def server():
    server = Server()
    yield server
    server.go.set()


@pytest.fixture
def connect(server):
    """Makes a Remote of the server."""
    made = []

    def make(deadline_s: float = 20, **arguments: object) -> Remote:
        remote = Remote(
            "place://x",
            deadline_s=deadline_s,
            fetch=server.fetch,
            faults=(OSError,),
            explain=lambda error: Explained(
                StoreError(f"no: {error}"), unanswered=not isinstance(error, PermissionError)
            ),
            **arguments,
        )
        made.append(remote)
        return remote

    yield make
    for remote in made:
        remote.close()


def test_reads_go_in_parallel_and_a_bounded_number_ahead(server, connect):
    server.blocks = {key(i): block(i, 2048) for i in range(40)}
    server.go.clear()
    found = connect().get_many([key(i) for i in range(40)])

    def go_when_all_have_asked() -> None:
        while len(server.asked) < 8:
            time.sleep(0.01)
        # A ninth would have the time to ask as well.
        time.sleep(0.1)
        server.go.set()

    threading.Thread(target=go_when_all_have_asked, daemon=True).start()
    assert next(found) == (key(0), block(0, 2048))
    assert server.most_running == 8
    assert len(server.asked) == 8
    assert list(found) == [(key(i), block(i, 2048)) for i in range(1, 40)]
    assert sorted(server.asked) == sorted(key(i) for i in range(40))


def test_what_does_not_come_within_the_deadline_is_missing(server, connect, caplog):
    server.blocks = {key(i): block(i, 2048) for i in range(30)}
    server.go.clear()
    remote = connect(2.0)
    found = list(remote.get_many([key(i) for i in range(30)]))
    assert found == [(key(i), None) for i in range(30)]
    stats = remote.stats()
    assert (stats.hits, stats.misses, stats.failures) == (0, 30, 30)
    assert "30 of 30 blocks did not come within the deadline of 2 s" in caplog.text
    # Eight were asked for and did not come: nobody is asked any more.
    assert len(server.asked) == 8
    server.go.set()
    assert remote.get(key(1)) is None
    assert len(server.asked) == 8


def test_the_consumers_own_time_is_not_the_servers(server, connect):
    server.blocks = {key(i): block(i, 2048) for i in range(4)}
    for _, data in connect(1.0).get_many([key(i) for i in range(4)]):
        assert data is not None
        time.sleep(0.3)


def test_a_reader_that_stops_early_lets_go_of_what_it_asked_for(server, connect):
    server.blocks = {key(i): block(i, 2048) for i in range(30)}
    remote = connect()
    found = remote.get_many([key(i) for i in range(30)])
    next(found)
    found.close()
    assert len(server.asked) < 30
    assert remote.stats().failures == 0
    assert remote.get(key(9)) == block(9, 2048)


def test_a_server_that_fails_is_left_alone_after_five(server, connect, caplog):
    server.error = ConnectionError("gone")
    remote = connect()
    for i in range(12):
        assert remote.get(key(i)) is None
    assert len(server.asked) == 5
    assert caplog.text.count("no: gone") == 5
    assert caplog.text.count("failed 5 times in a row") == 1
    assert remote.stats().failures == 12
    with pytest.raises(StoreError, match="has not been answering; try again in some seconds"):
        remote.write(lambda: None)
    assert remote.ask_each(lambda item: True, [1, 2]) == []


def test_a_damaged_block_is_missing_and_the_next_write_is_told(server, connect, caplog):
    damaged = bytearray(block(1, 2048))
    damaged[-1] ^= 1
    server.blocks = {key(1): bytes(damaged), key(2): block(3, 2048), key(3): block(3, 2048)[:-1]}
    remote = connect()
    assert list(remote.get_many([key(1), key(2), key(3)])) == [(key(1), None), (key(2), None), (key(3), None)]
    assert remote.stats().failures == 3
    assert "fails its checksum" in caplog.text
    assert f"it is block {key(3)}" in caplog.text
    told = []
    for _ in range(2):
        remote.counted_put(key(1), lambda damaged: told.append(damaged))
    assert told == [True, False]
    assert connect(checked=False).get(key(1)) == damaged


def test_bytes_that_claim_to_be_no_block_are_handed_on(server, connect):
    server.blocks = {key(1): b"", key(2): b"x" * 5000, key(3): b"short"}
    assert [bytes(data) for _, data in connect().get_many([key(1), key(2), key(3)])] == [b"", b"x" * 5000, b"short"]


def test_nothing_is_written_while_the_last_answer_did_not_come(server, connect):
    remote = connect()
    told = []
    remote.write(lambda: told.append(1))
    server.error = ConnectionError("gone")
    remote.get(key(1))
    with pytest.raises(StoreError, match="has not been answering; try again in some seconds"):
        remote.write(lambda: told.append(2))
    server.error = None
    remote.get(key(1))
    remote.write(lambda: told.append(3))
    assert told == [1, 3]


def test_a_write_that_is_only_refused_says_nothing_about_the_server(server, connect):
    remote = connect()

    def refuse() -> None:
        raise PermissionError("read only")

    for _ in range(20):
        with pytest.raises(StoreError, match="no: read only"):
            remote.write(refuse)
    server.blocks = {key(1): block(1, 2048)}
    assert remote.get(key(1)) == block(1, 2048)
    assert remote.stats().failures == 20


def test_a_store_error_of_the_write_itself_stays_as_it_is(connect):
    def fill() -> None:
        raise StoreFullError("full")

    remote = connect()
    with pytest.raises(StoreFullError, match="full"):
        remote.write(fill)
    assert remote.stats().failures == 1


def test_closing_ends_what_is_being_read(server, connect):
    server.go.clear()
    remote = connect()
    found = remote.get_many([key(i) for i in range(40)])
    threading.Timer(0.2, lambda: (remote.close(), server.go.set())).start()
    with pytest.raises(StoreError, match="is closed"):
        list(found)


def test_closing_ends_what_is_being_asked(server, connect):
    server.go.clear()
    remote = connect()
    threading.Timer(0.2, lambda: (remote.close(), server.go.set())).start()
    with pytest.raises(StoreError, match="is closed"):
        remote.ask_each(server.fetch, [key(i) for i in range(40)])


def test_nothing_is_asked_after_closing(connect):
    remote = connect()

    def items():
        yield from range(1024)
        remote.close()
        yield 1024

    with pytest.raises(StoreError, match="is closed"):
        remote.ask_each(lambda item: True, items())


def test_many_questions_do_not_keep_a_reader_waiting(server, connect):
    server.blocks = {key(1): block(1, 2048)}
    remote = connect(5)
    asked, go = threading.Semaphore(0), threading.Event()

    def ask(item: int) -> bool:
        asked.release()
        return go.wait(20)

    answers = []
    asking = threading.Thread(target=lambda: answers.extend(remote.ask_each(ask, range(100))))
    asking.start()
    for _ in range(16):
        assert asked.acquire(timeout=20)
    assert remote.get(key(1)) == block(1, 2048)
    go.set()
    asking.join()
    assert answers == [True] * 100


def test_what_must_be_done_with_each_fails_with_the_reason(connect):
    def fail(item: int) -> None:
        if item == 3:
            raise ConnectionError("gone")

    remote = connect()
    with pytest.raises(StoreError, match="no: gone") as error:
        remote.write_each(fail, range(10))
    assert isinstance(error.value.__cause__, ConnectionError)
    # What comes after it is refused because of it, and is a failure too.
    assert remote.stats().failures >= 1


@pytest.mark.parametrize("bad", [0, -1, 3601, float("nan"), float("inf")])
def test_deadlines_are_positive_and_not_endless(connect, bad):
    with pytest.raises(InputError, match="pass more than 0 and at most 3600"):
        connect(bad)
