"""What is counted and timed, in Prometheus' form. Each application has a registry of its own.

Source: https://prometheus.io/docs/practices/naming/
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from blockrag.errors import StoreError
from blockrag.server.connection import GONE

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from blockrag.model.usage import Usage
    from blockrag.server.gate import Gate
    from blockrag.stores import BlockStore, StoreStats

__all__ = ["Metrics", "RequestMetrics"]

# Reused passages answer in milliseconds, long prompts on a CPU in minutes.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """The metrics of one server.

    Args:
        gate: Whose queue is shown.
        store: Whose contents are shown.
    """

    def __init__(self, gate: Gate, store: BlockStore) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("blockrag_requests", "Requests.", ["route", "status"], registry=registry)
        self._duration = Histogram(
            "blockrag_request_seconds", "From request to the end.", ["route"], buckets=_SECONDS, registry=registry
        )
        self._first_token = Histogram(
            "blockrag_ttft_seconds",
            "From request to the first token, waiting included.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._tokens = Counter("blockrag_tokens", "Tokens of prompts and answers.", ["kind"], registry=registry)
        self._blocks = Counter("blockrag_blocks", "Blocks of prompts.", ["kind"], registry=registry)
        self._failures = Counter(
            "blockrag_prompt_store_failures", "Reads and writes of prompts' blocks that failed.", registry=registry
        )
        waiting = Gauge("blockrag_queue_depth", "Requests that wait for their turn.", registry=registry)
        waiting.set_function(lambda: gate.waiting)
        running = Gauge("blockrag_in_flight", "Requests being answered.", registry=registry)
        running.set_function(lambda: gate.running)
        registry.register(_StoreMetrics(store))

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count a request that is over."""
        self._requests.labels(route, str(status)).inc()
        self._duration.labels(route).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """Note how long a request waited for its first token."""
        self._first_token.observe(seconds)

    def answered(self, usage: Usage) -> None:
        """Count the work of an answer."""
        for kind, tokens in (
            ("reused", usage.tokens_reused),
            ("computed", usage.tokens_computed),
            ("generated", usage.new_tokens),
        ):
            self._tokens.labels(kind).inc(tokens)
        for kind, blocks in (
            ("reused", usage.blocks_reused),
            ("computed", usage.blocks_computed),
            ("damaged", usage.blocks_damaged),
            ("missing", usage.blocks_missing),
        ):
            self._blocks.labels(kind).inc(blocks)
        self._failures.inc(usage.store_failures)

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)


class _StoreMetrics(Collector):
    """Contents and traffic of the block store, read when somebody asks."""

    def __init__(self, store: BlockStore) -> None:
        self._store = store

    def describe(self) -> Iterator[Metric]:
        """Nothing: what there is does not depend on the store's state, and must not be read for it."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The store's counters; none if it cannot be read, which `/health` reports."""
        try:
            stats = self._store.stats()
        except StoreError:
            return
        # A bucket is not counted.
        if stats.blocks is not None:
            yield GaugeMetricFamily("blockrag_store_blocks", "Blocks stored.", value=stats.blocks)
        if stats.bytes is not None:
            yield GaugeMetricFamily("blockrag_store_bytes", "Bytes stored.", value=stats.bytes)
        if stats.max_bytes is not None:
            yield GaugeMetricFamily("blockrag_store_max_bytes", "The store's byte budget.", value=stats.max_bytes)
        yield CounterMetricFamily("blockrag_store_hits", "Blocks found.", value=stats.hits)
        yield CounterMetricFamily("blockrag_store_misses", "Blocks not found.", value=stats.misses)
        yield CounterMetricFamily("blockrag_store_puts", "Blocks written.", value=stats.puts)
        yield CounterMetricFamily("blockrag_store_evictions", "Blocks evicted.", value=stats.evictions)
        yield CounterMetricFamily("blockrag_store_failures", "Blocks lost to faults.", value=stats.failures)
        yield from _tier_metrics(stats.tiers)


def _tier_metrics(tiers: Sequence[tuple[str, StoreStats]]) -> Iterator[Metric]:
    """Traffic of the stores that the store is made of, by URL."""
    for name, text in (("hits", "Blocks found."), ("misses", "Blocks not found."), ("puts", "Blocks written.")):
        family = CounterMetricFamily(f"blockrag_store_tier_{name}", text, labels=["tier"])
        for url, stats in tiers:
            family.add_metric([url], getattr(stats, name))
        if tiers:
            yield family


class RequestMetrics:
    """ASGI middleware that counts and times every request.

    Args:
        app: What is behind it.
        metrics: Where they are counted.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and note how it ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        status = GONE

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            # A path that no route knows may be anything; there must not be a time series for each.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(route, status, time.monotonic() - started)
