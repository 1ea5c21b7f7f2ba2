"""`Breaker`: stops asking a server that does not answer, for a while.

A dead server costs every prompt its deadline. After a few failures in a row nothing more is asked, which is a miss at
once; after a pause one request is let through, and its outcome decides. It knows nothing of what is asked.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

__all__ = ["Breaker"]

_LOG = logging.getLogger(__name__)

_FAILURES: Final = 5
# Long beside a deadline, so that a dead server costs one prompt in many its wait; short beside an outage.
_PAUSE_S: Final = 10.0


class Breaker:
    """Counts failures in a row. Thread-safe.

    Args:
        name: What the log calls the server.
        clock: Seconds that only grow.
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._failed_at = 0.0
        self._closed_until = 0.0

    @property
    def shaken(self) -> bool:
        """Whether the last request failed, not long ago."""
        with self._lock:
            return self._failures > 0 and self._clock() < self._failed_at + _PAUSE_S

    def allows(self) -> bool:
        """Whether to ask now; whoever is allowed reports `succeeded` or `failed`."""
        with self._lock:
            if self._failures < _FAILURES:
                return True
            now = self._clock()
            if now < self._closed_until:
                return False
            # One request at a time tries; should its outcome never be reported, another does after the next pause.
            self._closed_until = now + _PAUSE_S
            return True

    def succeeded(self) -> None:
        """The server answered, whatever it said."""
        with self._lock:
            if self._failures >= _FAILURES:
                _LOG.warning("%s answers again", self._name)
            self._failures = 0

    def failed(self) -> None:
        """The server did not answer, or could not do what it always does."""
        with self._lock:
            self._failures += 1
            self._failed_at = self._clock()
            if self._failures >= _FAILURES:
                self._closed_until = self._failed_at + _PAUSE_S
            if self._failures == _FAILURES:
                _LOG.warning(
                    "%s failed %d times in a row; what it keeps is missing until it answers, asked again every %g s",
                    self._name,
                    _FAILURES,
                    _PAUSE_S,
                )
