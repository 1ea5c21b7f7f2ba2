"""Blocks that are being loaded or computed right now: one request does the work, the others wait for its result.

Requests that run at the same time tend to want the same passages. Whoever boards a block first is responsible for it
and lands it with the KV states, or without them when it gives up; the others wait, and do the work themselves in the
second case. A request lands all of its own blocks before it waits for those of others, so no two wait for each other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockrag.quantize import StoredKV

__all__ = ["Flight", "FlightKey", "InFlight"]

FlightKey = tuple[int, str]
"""Identity of the store, and block key."""


class Flight:
    """One block on its way."""

    __slots__ = ("_kv", "_landed")

    def __init__(self) -> None:
        self._landed = threading.Event()
        self._kv: StoredKV | None = None

    def land(self, kv: StoredKV | None) -> None:
        """Hand the result to all who wait."""
        self._kv = kv
        self._landed.set()

    def wait(self) -> StoredKV | None:
        """The KV states, or None when whoever was responsible gave up."""
        self._landed.wait()
        return self._kv


class InFlight:
    """The flights of one model."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[FlightKey, Flight] = {}

    def board(self, keys: Iterable[FlightKey]) -> tuple[list[FlightKey], dict[FlightKey, Flight]]:
        """Take responsibility for the blocks nobody is responsible for.

        Returns:
            Those the caller must now land, each exactly once; and the flights of the others, to wait for.
        """
        mine: list[FlightKey] = []
        others: dict[FlightKey, Flight] = {}
        with self._lock:
            for key in keys:
                flight = self._flights.get(key)
                if flight is None:
                    self._flights[key] = Flight()
                    mine.append(key)
                else:
                    others[key] = flight
        return mine, others

    def land(self, key: FlightKey, kv: StoredKV | None) -> None:
        """Hand a block over; landing one that has landed already does nothing."""
        with self._lock:
            flight = self._flights.pop(key, None)
        if flight is not None:
            flight.land(kv)
