"""Models over stores behind a network: the answers are those of a store in memory, whatever the server does."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import obstore
import pytest
from live_server import DOCUMENTS, QUESTION, live_server
from obstore.store import S3Store
from store_servers import Proxy, redis_server, s3_server
from test_exactness import QUERY, prompt_of
from typer.testing import CliRunner

from blockrag.cli import app
from blockrag.model.block_model import BlockModel
from blockrag.model.sampling import GenerationOptions
from blockrag.stores import open_store

LENGTHS = (7, 12, 9, 30, 5, 8)
OPTIONS = GenerationOptions(max_new_tokens=6, ignore_eos=True)
OBJECTS = "?allow_http=true&region=us-east-1&endpoint=http://127.0.0.1:"


@pytest.fixture(autouse=True)
def credentials(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")


def url_of(kind: str, port: int, deadline_s: float) -> str:
    address = f"s3://bucket/x{OBJECTS}{port}&" if kind == "s3" else f"redis://127.0.0.1:{port}?"
    return f"{address}deadline={deadline_s}"


@pytest.fixture(scope="module", params=["s3", "redis"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def server(kind, tmp_path_factory):
    """A running server: the process and its port."""
    start = s3_server if kind == "s3" else redis_server
    with start(tmp_path_factory.mktemp(kind)) as (process, port):
        yield process, port


@pytest.fixture
def proxy(server) -> Iterator[Proxy]:
    proxy = Proxy(server[1])
    yield proxy
    proxy.close()


@pytest.mark.parametrize("fault", ["stall", "partial", "flip"])
def test_answers_are_the_same_whatever_the_connection_does(make_model, kind, proxy, fault):
    model = make_model("llama")
    prompt = prompt_of(LENGTHS, QUERY)
    expected = model.generate(prompt, OPTIONS).token_ids
    with closing(open_store(url_of(kind, proxy.port, deadline_s=1))) as store:
        model.generate(prompt, OPTIONS, store=store)
        proxy.fault = fault
        failing = model.generate(prompt, OPTIONS, store=store)
        assert (failing.token_ids, failing.usage.blocks_reused) == (expected, 0)


def test_a_memory_before_it_outlives_the_connection(make_model, kind, proxy):
    model = make_model("llama")
    prompt = prompt_of(LENGTHS, QUERY)
    with closing(open_store(f"tiered:memory://|{url_of(kind, proxy.port, deadline_s=1)}")) as store:
        first = model.generate(prompt, OPTIONS, store=store)
        proxy.fault = "reset"
        again = model.generate(prompt, OPTIONS, store=store)
        assert (again.token_ids, again.usage.blocks_reused) == (first.token_ids, len(LENGTHS))


def test_answers_are_the_same_when_the_server_dies(make_model, kind, server):
    """The last test with this server."""
    process, port = server
    model = make_model("llama")
    prompt, other = prompt_of(LENGTHS, QUERY), prompt_of(LENGTHS, QUERY, seed=6)
    expected = model.generate(prompt, OPTIONS).token_ids
    expected_other = model.generate(other, OPTIONS).token_ids
    with closing(open_store(url_of(kind, port, deadline_s=30))) as store:
        store.delete_many(store.keys())
        first = model.generate(prompt, OPTIONS, store=store)
        assert (first.token_ids, first.usage.blocks_reused) == (expected, 0)
        again = model.generate(prompt, OPTIONS, store=store)
        assert (again.token_ids, again.usage.blocks_reused) == (expected, len(LENGTHS))
        process.kill()
        process.wait()
        for _ in range(2):
            dead = model.generate(prompt, OPTIONS, store=store)
            assert (dead.token_ids, dead.usage.blocks_reused) == (expected, 0)
            assert model.generate(other, OPTIONS, store=store).token_ids == expected_other


def test_damaged_objects_are_computed_anew_and_replaced(make_model, tmp_path):
    model = make_model("llama")
    prompt = prompt_of(LENGTHS, QUERY)
    with s3_server(tmp_path) as (_, port), closing(open_store(f"s3://bucket/x{OBJECTS}{port}")) as store:
        first = model.generate(prompt, OPTIONS, store=store)
        bucket = S3Store(
            "bucket",
            prefix="x",
            config={"endpoint": f"http://127.0.0.1:{port}", "region": "us-east-1"},
            client_options={"allow_http": True},
        )
        for entry in obstore.list(bucket, prefix="blocks").collect():
            data = bytearray(obstore.get(bucket, entry["path"]).bytes())
            data[-5] ^= 64
            obstore.put(bucket, entry["path"], data)
        again = model.generate(prompt, OPTIONS, store=store)
        assert (again.token_ids, again.usage.blocks_reused) == (first.token_ids, 0)
        assert store.verify().ok
        healed = model.generate(prompt, OPTIONS, store=store)
        assert (healed.token_ids, healed.usage.blocks_reused) == (first.token_ids, len(LENGTHS))


def test_the_command_line_takes_every_url(tmp_path: Path) -> None:
    lines = [{"blocks": ["The capital of Bhutan is Thimphu. ", "The capital of Kenya is Nairobi. ", "What is it?"]}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def generated(name: str, *store: str) -> object:
        command = ["generate", "--model", "demo", "--input", tmp_path / "in.jsonl", "--output", tmp_path / name]
        done = CliRunner().invoke(app, [str(word) for word in (*command, "--max-new-tokens", 4, "--json", *store)])
        assert done.exit_code == 0, done.output
        return json.loads((tmp_path / name).read_text())["generated"]

    expected = generated("memory")
    url = f"tiered:memory://?max_bytes=1GB|file://{tmp_path}/objects"
    assert generated("first", "--store", url) == expected
    assert len(list((tmp_path / "objects" / "blocks").rglob("*"))) >= 2
    assert generated("second", "--store", url) == expected


def test_a_server_over_tiers_shows_them(tmp_path: Path) -> None:
    url = f"tiered:memory://?max_bytes=1000000|file://{tmp_path}/objects"
    model = BlockModel.from_pretrained("demo", device="cpu", store=open_store(url))
    with live_server(model) as live:
        client = live.client()
        for documents in (DOCUMENTS, DOCUMENTS[::-1]):
            client.chat.completions.create(
                model="demo", messages=[QUESTION], max_tokens=2, extra_body={"documents": documents}
            )
        text = live.http.get("/metrics").text
        # The last tier is a bucket, which is not counted.
        assert "blockrag_store_blocks" not in text
        assert live.metric("blockrag_store_tier_hits_total", tier="memory://?max_bytes=1000000") >= 2
        assert live.metric("blockrag_store_tier_puts_total", tier=f"file://{tmp_path}/objects") >= 2
        assert live.http.get("/v1/blocks").json()["store"] == {"blocks": None, "bytes": None, "max_bytes": None}
        assert live.http.get("/health").json()["ready"]
    model.store.close()
