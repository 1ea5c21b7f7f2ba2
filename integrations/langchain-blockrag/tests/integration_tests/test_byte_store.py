"""`BlockKVByteStore`: any key, and the blocks themselves, in a real block store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from blockrag.stores import MemoryStore, open_store
from langchain_core.documents import Document

from langchain_blockrag import BlockKVByteStore, ChatBlockRAG, documents_to_blocks
from tests.conftest import QUESTION


def cache_read(message: Any) -> int:
    return message.usage_metadata["input_token_details"]["cache_read"]


def pairs(store: BlockKVByteStore, keys: list[str]) -> list[tuple[str, bytes]]:
    return [(key, value) for key, value in zip(keys, store.mget(keys), strict=True) if value is not None]


@pytest.mark.parametrize(
    "key", ["", "a", "a/b c.bin", "ключ", "\ud800", "x" * 5000, "a" * 63, "A" * 64, b"blockrag".hex() + "0" * 48]
)
def test_any_string_is_a_key(tmp_path: Path, key: str) -> None:
    store = BlockKVByteStore(f"disk://{tmp_path}/kv")
    store.mset([(key, b"value"), ("other", b"")])
    assert store.mget([key, "missing", key]) == [b"value", None, b"value"]
    assert sorted(store.yield_keys()) == sorted([key, "other"])
    store.mdelete([key, "missing"])
    assert list(store.yield_keys()) == ["other"]


def test_values_are_there_for_the_next_process(tmp_path: Path) -> None:
    inner = open_store(f"disk://{tmp_path}/kv")
    BlockKVByteStore(inner).mset([("key", b"value")])
    inner.close()
    assert BlockKVByteStore(open_store(f"disk://{tmp_path}/kv")).mget(["key"]) == [b"value"]


def test_blocks_move_between_stores(llm: ChatBlockRAG, documents: list[Document]) -> None:
    asked = [documents_to_blocks(documents, QUESTION)]
    llm.invoke(asked)
    model = llm.block_model()
    blocks = BlockKVByteStore(model.store)
    keys = list(blocks.yield_keys())
    assert sorted(keys) == sorted(model.store.keys())
    copy = BlockKVByteStore(MemoryStore())
    copy.mset([("a note", b"among them"), *pairs(blocks, keys)])
    assert sorted(copy.yield_keys()) == sorted([*keys, "a note"])
    blocks.mdelete(keys)
    model.forget_kept()
    assert cache_read(llm.invoke(asked)) == 0
    model.forget_kept()
    model.store.delete_many(keys)
    blocks.mset(pairs(copy, keys))
    restored = llm.invoke(asked)
    assert restored.text == "Thimphu"
    assert cache_read(restored) > 0


async def test_its_url_is_the_store_of_models_with_that_url(documents: list[Document]) -> None:
    url = "memory://?max_bytes=9MB"
    await ChatBlockRAG(store_url=url, max_tokens=4).ainvoke([documents_to_blocks(documents, QUESTION)])
    store = BlockKVByteStore(url)
    keys = [key async for key in store.ayield_keys()]
    assert len(keys) == 1 + len(documents)
    assert None not in await store.amget(keys)
    await store.amset([("note", b"1")])
    assert [key async for key in store.ayield_keys(prefix="no")] == ["note"]
    await store.amdelete([*keys, "note"])
    assert [key async for key in store.ayield_keys()] == []


def test_what_the_budget_evicts_is_gone() -> None:
    store = BlockKVByteStore(MemoryStore(max_bytes=1000))
    store.mset([("first", b"x" * 600), ("second", b"y" * 600)])
    assert store.mget(["first", "second"]) == [None, b"y" * 600]


def test_a_damaged_value_is_an_error_not_another_value() -> None:
    inner = MemoryStore()
    store = BlockKVByteStore(inner)
    store.mset([("key", b"value")])
    (stored,) = inner.keys()
    inner.put(stored, b"\xff\xff\xff\xff")
    with pytest.raises(ValueError, match="damaged"):
        store.mget(["key"])
    inner.put(stored, b"\x00\x00\x00\x01yvalue")
    with pytest.raises(ValueError, match="'y' in the place of 'key'"):
        store.mget(["key"])


@pytest.mark.parametrize(
    ("do", "says"),
    [
        (lambda s: s.mset([("key", "text")]), "must be bytes, got str"),
        (lambda s: s.mset([(7, b"value")]), "must be a string, got int"),
        (lambda s: s.mset([("key", b"x" * 2000)]), "max_bytes"),
        (lambda s: s.mget([None]), "got NoneType"),
        (lambda s: BlockKVByteStore("redis://x"), "redis://x"),
        (lambda s: [s._store.close(), s.mget(["key"])], "closed"),
    ],
)
def test_bad_input_is_a_value_error(do: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        do(BlockKVByteStore(MemoryStore(max_bytes=1000)))
