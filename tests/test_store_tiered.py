"""Stores behind each other: where a block is read from, where it goes, and what the tiers know of each other."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from reliability.blocks import FINGERPRINT, block, key

from blockrag.errors import InputError, StoreError, StoreFullError
from blockrag.stores import DiskStore, MemoryStore, TieredStore, open_store

SIZE = 2048


def damaged(number: int) -> bytes:
    data = bytearray(block(number, SIZE))
    data[-1] ^= 1
    return bytes(data)


@pytest.fixture
def memory():
    return MemoryStore(10 * SIZE)


@pytest.fixture
def disk(tmp_path):
    return DiskStore(tmp_path / "disk")


@pytest.fixture
def last(tmp_path):
    return open_store(f"file://{tmp_path}/objects")


@pytest.fixture
def store(memory, disk, last):
    with closing(TieredStore([memory, disk, last])) as store:
        yield store


class TestReading:
    def test_what_is_found_below_is_put_above(self, store, memory, disk, last):
        last.put(key(1), block(1, SIZE))
        disk.put(key(2), block(2, SIZE))
        assert store.get(key(1)) == block(1, SIZE)
        assert store.get(key(2)) == block(2, SIZE)
        assert set(memory.keys()) == set(disk.keys()) == {key(1), key(2)}
        assert list(last.keys()) == [key(1)]
        reads = disk.stats().hits
        assert store.get(key(1)) == block(1, SIZE)
        assert disk.stats().hits == reads

    def test_many_keep_their_order_and_are_put_above(self, store, memory, disk, last):
        for i in range(9):
            (memory, disk, last)[i % 3].put(key(i), block(i, SIZE))
        wanted = [key(i) for i in (8, 20, *range(8), 21)]
        found = list(store.get_many(wanted))
        assert [name for name, _ in found] == wanted
        assert {name: data for name, data in found if data is not None} == {key(i): block(i, SIZE) for i in range(9)}
        assert set(memory.keys()) == {key(i) for i in range(9)}
        assert set(disk.keys()) == {key(i) for i in range(9) if i % 3}
        stats = store.stats()
        assert (stats.hits, stats.misses) == (9, 2)

    def test_blocks_from_below_do_not_push_out_those_still_to_be_read(self, disk, last):
        memory = MemoryStore(2 * SIZE)
        with closing(TieredStore([memory, disk, last])) as store:
            for i in range(2):
                memory.put(key(i), block(i, SIZE))
            for i in range(2, 8):
                last.put(key(i), block(i, SIZE))
            found = list(store.get_many([key(i) for i in (2, 3, 0, 4, 5, 6, 1, 7)]))
            assert all(data is not None for _, data in found)
            assert memory.stats().hits == 2
            assert store.stats().failures == 0

    def test_a_block_that_goes_between_is_looked_for_below(self, store, memory, last):
        last.put(key(1), block(1, SIZE))
        last.put(key(2), block(2, SIZE))
        assert store.get(key(2)) == block(2, SIZE)
        found = store.get_many([key(1), key(2)])
        assert next(found) == (key(1), block(1, SIZE))
        memory.delete_many([key(2)])
        assert next(found) == (key(2), block(2, SIZE))

    @pytest.mark.parametrize("many", [False, True])
    def test_a_damaged_copy_is_replaced_from_below(self, store, disk, last, many, caplog):
        disk.put(key(1), damaged(1))
        last.put(key(1), block(1, SIZE))
        found = dict(store.get_many([key(1)]))[key(1)] if many else store.get(key(1))
        assert found == block(1, SIZE)
        assert disk.get(key(1)) == block(1, SIZE)
        assert store.stats().failures == 1
        assert "is damaged: block" in caplog.text

    def test_damaged_everywhere_is_missing_and_put_replaces_it_everywhere(self, store, memory, disk, last, tmp_path):
        disk.put(key(1), damaged(1))
        last.put(key(1), damaged(1))
        assert store.get(key(1)) is None
        assert list(memory.keys()) == []
        store.put(key(1), block(1, SIZE))
        assert {bytes(tier.get(key(1))) for tier in (memory, disk, last)} == {block(1, SIZE)}

    def test_bytes_that_are_no_block_pass(self, store, memory, last):
        last.put(key(1), b"anything")
        assert store.get(key(1)) == b"anything"
        assert memory.get(key(1)) == b"anything"


class TestWriting:
    def test_goes_to_all(self, store, memory, disk, last):
        store.put(key(1), block(1, SIZE))
        assert all(list(tier.keys()) == [key(1)] for tier in (memory, disk, last))

    def test_a_tier_above_may_refuse(self, store, memory, disk, caplog):
        with caplog.at_level(logging.INFO):
            store.put(key(1), block(1, 20 * SIZE))
        assert list(memory.keys()) == []
        assert store.get(key(1)) == block(1, 20 * SIZE)
        assert (store.stats().puts, store.stats().failures) == (1, 0)
        assert caplog.messages == []

    def test_a_tier_above_that_refuses_keeps_nothing_else_under_the_key(self, store, memory):
        store.put(key(1), damaged(1))
        store.put(key(1), block(1, 20 * SIZE))
        assert list(memory.keys()) == []
        assert store.get(key(1)) == block(1, 20 * SIZE)

    def test_a_tier_above_that_fails_is_logged(self, store, disk, caplog):
        disk.close()
        store.put(key(1), block(1, SIZE))
        assert "left to the tiers below: the store disk://" in caplog.text

    def test_the_last_tier_must_take_it(self, memory, tmp_path):
        with closing(TieredStore([memory, DiskStore(tmp_path / "small", max_bytes=SIZE)])) as store:
            with pytest.raises(StoreFullError, match="exceeds max_bytes"):
                store.put(key(1), block(1, 2 * SIZE))
            assert store.stats().puts == 0
            # Computed it was: the next prompt of this process has it all the same.
            assert store.get(key(1)) == block(1, 2 * SIZE)
            assert store.contains_many([key(1)]) == set()


class Interrupted(MemoryStore):
    """A tier in which something else happens, once, after a block was read or removed."""

    after_get = after_delete = None

    def get(self, key):
        data = super().get(key)
        happens, self.after_get = self.after_get, None
        if happens is not None:
            happens()
        return data

    def delete_many(self, keys):
        count = super().delete_many(keys)
        happens, self.after_delete = self.after_delete, None
        if happens is not None:
            happens()
        return count


class TestAtTheSameTime:
    @pytest.fixture
    def tiers(self):
        return [Interrupted() for _ in range(3)]

    @pytest.fixture
    def store(self, tiers):
        with closing(TieredStore(tiers)) as store:
            yield store

    @pytest.mark.parametrize("place", [1, 2])
    @pytest.mark.parametrize("many", [False, True])
    def test_what_is_deleted_while_it_is_read_does_not_come_back(self, store, tiers, place, many):
        for i in range(3):
            tiers[place].put(key(i), block(i, SIZE))
        tiers[place].after_get = lambda: store.delete_many([key(1)])
        wanted = [key(1), key(2)]
        found = dict(store.get_many(wanted)) if many else {name: store.get(name) for name in wanted}
        assert found == {key(1): block(1, SIZE), key(2): block(2, SIZE)}
        assert sorted(store.keys()) == sorted([key(0), key(2)])
        # What was not deleted has been put above all the same.
        assert list(tiers[0].keys()) == [key(2)]
        store.put(key(1), block(1, SIZE))
        assert store.get(key(1)) == block(1, SIZE)
        assert tiers[0].contains_many([key(1)]) == {key(1)}

    @pytest.mark.parametrize("place", range(3))
    def test_what_is_put_while_it_is_deleted_is_below_if_it_is_anywhere(self, store, tiers, place):
        store.put(key(1), block(1, SIZE))
        tiers[place].after_delete = lambda: store.put(key(1), block(1, SIZE))
        store.delete_many([key(1)])
        assert store.contains_many([key(1)]) == set(store.keys())

    def test_threads_that_read_write_and_delete_leave_nothing_above_that_is_not_below(self, tmp_path):
        tiers = [MemoryStore(), DiskStore(tmp_path / "d"), open_store("memory:///")]
        with closing(TieredStore(tiers)) as store:
            numbers = range(4)

            def read() -> None:
                for _ in range(40):
                    for number, (_, data) in zip(numbers, store.get_many([key(i) for i in numbers]), strict=True):
                        assert data is None or data == block(number, SIZE)

            def write() -> None:
                for i in range(40):
                    store.put(key(i % 4), block(i % 4, SIZE))

            def delete() -> None:
                for i in range(60):
                    store.delete_many([key(i % 4)])

            with ThreadPoolExecutor(5) as threads:
                for done in [threads.submit(call) for call in (read, read, write, delete, delete)]:
                    done.result()
            there = store.contains_many(key(i) for i in numbers)
            assert there == set(store.keys())


class TestContents:
    def test_stored_is_what_the_last_tier_has(self, store, memory, disk, last):
        memory.put(key(1), block(1, SIZE))
        disk.put(key(2), block(2, SIZE))
        last.put(key(3), block(3, SIZE))
        assert store.contains_many(key(i) for i in range(5)) == {key(3)}
        assert sorted(store.keys()) == sorted(key(i) for i in (1, 2, 3))

    def test_deleting_deletes_everywhere(self, store, memory, disk, last):
        for tier, number in ((memory, 1), (disk, 2), (last, 3), (last, 1)):
            tier.put(key(number), block(number, SIZE))
        assert store.delete_many(key(i) for i in range(9)) == 3
        assert list(store.keys()) == []

    def test_a_tier_that_cannot_delete_does_not_keep_the_others_from_it(self, store, memory, disk, last):
        store.put(key(1), block(1, SIZE))
        disk.close()
        with pytest.raises(StoreError, match="is closed"):
            store.delete_many([key(1)])
        assert list(memory.keys()) == list(last.keys()) == []

    def test_statistics_are_the_last_tiers_and_each_ones(self, memory, tmp_path):
        disk = DiskStore(tmp_path / "d", max_bytes=100 * SIZE)
        with closing(TieredStore([memory, disk])) as store:
            for i in range(20):
                store.put(key(i), block(i, SIZE))
            store.get(key(19))
            list(store.get_many([key(18), key(1), key(50)]))
            stats = store.stats()
            assert (stats.blocks, stats.bytes, stats.max_bytes) == (20, 20 * SIZE, 100 * SIZE)
            assert (stats.hits, stats.misses, stats.puts, stats.evictions) == (3, 1, 20, 0)
            (memory_url, above), (disk_url, below) = stats.tiers
            assert (memory_url, disk_url) == (memory.url, disk.url)
            # Evictions of a tier above are its business: 10 when it was filled, one for the block that came up.
            assert (above.blocks, above.evictions) == (10, 11)
            assert (above.hits, above.misses) == (2, 2)
            assert (below.hits, below.misses) == (1, 1)

    def test_pins_hold_in_every_tier(self, memory, disk):
        with closing(TieredStore([memory, disk])) as store:
            for i in range(10):
                store.put(key(i), block(i, SIZE))
            with store.pinned([key(0)]):
                for i in range(10, 30):
                    store.put(key(i), block(i, SIZE))
                assert memory.contains_many([key(0)]) == {key(0)}
            store.put(key(30), block(30, SIZE))
            store.put(key(31), block(31, SIZE))
            assert memory.contains_many([key(0)]) == set()

    def test_a_check_is_of_every_tier(self, store, memory, disk, last):
        for i in range(3):
            store.put(key(i), block(i, SIZE))
        memory.put(key(5), damaged(5))
        disk.put(key(6), damaged(6))
        last.put(key(7), damaged(7))
        report = store.verify()
        assert (report.url, report.blocks, report.fingerprints) == (store.url, 3, {FINGERPRINT: 3})
        assert [fault.where for fault in report.faults] == [key(5), key(6), key(7)]
        for fault, tier in zip(report.faults, (memory, disk, last), strict=True):
            assert fault.message.startswith(f"{tier.url}: ")
        assert store.verify(fix=True).ok
        assert store.verify().faults == ()
        assert sorted(store.keys()) == sorted(key(i) for i in range(3))


class TestUrls:
    def test_tiers_are_written_with_bars(self, tmp_path):
        text = f"tiered:memory://?max_bytes=1KiB|disk://{tmp_path}/a%7Cb?max_bytes=1MB|memory:///?deadline=3"
        with closing(open_store(text)) as store:
            assert (tmp_path / "a|b" / "cache.db").is_file()
            assert store.url == f"tiered:memory://?max_bytes=1024|disk://{tmp_path}/a%7Cb?max_bytes=1000000|" + (
                "memory:///?deadline=3"
            )
            with closing(open_store(store.url)) as again:
                assert again.url == store.url

    @pytest.mark.parametrize(
        ("url", "said"),
        [
            ("tiered:", "write plain stores with | between them"),
            ("tiered:memory://|", "write plain stores with | between them"),
            ("tiered:memory://|tiered:memory://", "write plain stores with | between them"),
            ("tiered://memory://", "cannot open store '//memory://'; use one of"),
            ("tiered:memory://|ftp://x", "cannot open store 'ftp://x'"),
            ("tiered:memory://|redis://:s3cret@host", "no credentials in a URL"),
        ],
    )
    def test_what_cannot_be_opened(self, url, said):
        with pytest.raises(InputError) as error:
            open_store(url)
        assert said in str(error.value)
        assert "s3cret" not in str(error.value)

    def test_tiers_that_were_opened_are_closed_when_another_cannot_be(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(StoreError, match="choose"):
            open_store(f"tiered:disk://{tmp_path}/d|file://{tmp_path}/file")
        with closing(open_store(f"disk://{tmp_path}/d")) as disk:
            disk.put(key(1), b"x")

    def test_a_tier_is_a_plain_store(self, memory):
        with pytest.raises(InputError, match="one or more plain stores"):
            TieredStore([])
        with pytest.raises(InputError, match="one or more plain stores"):
            TieredStore([TieredStore([memory])])
