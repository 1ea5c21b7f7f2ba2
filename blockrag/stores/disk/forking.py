"""A process that forks finds its stores at rest: no thread within SQLite, no connection open, no lock taken.

SQLite cannot be carried through a fork (sqlite.org/howtocorrupt.html, 2.6). A child takes its parent's file locks for
its own, though the system gave it none; the parent then removes the write-ahead log under it when it closes, and what
both write afterwards destroys the index. And a mutex that another thread held at the fork stays held in the child.

So a fork waits until the statements and transactions of other threads are over, and closes the connections; parent and
child open new ones when they go on. Nothing here knows what the statements are.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

__all__ = ["after_forks_in_child", "at_work", "before_forks"]

_Methods: TypeAlias = set[weakref.WeakMethod[Callable[[], None]]]


class _Gate:
    """Counts the threads at work, and keeps new ones out while somebody forks."""

    def __init__(self) -> None:
        self.renew(inside=0)

    def renew(self, *, inside: int) -> None:
        """Forget the threads of the parent, which a child does not have."""
        self._condition = threading.Condition()
        self._inside = inside
        self._closed = False

    def enter(self) -> None:
        with self._condition:
            self._condition.wait_for(lambda: not self._closed)
            self._inside += 1

    def leave(self) -> None:
        with self._condition:
            self._inside -= 1
            if self._closed:
                self._condition.notify_all()

    def close(self, *, inside: int) -> None:
        """Let nobody enter, and wait until no more than `inside` threads are."""
        with self._condition:
            self._condition.wait_for(lambda: not self._closed)
            self._closed = True
            self._condition.wait_for(lambda: self._inside <= inside)

    def open(self) -> None:
        with self._condition:
            self._closed = False
            self._condition.notify_all()


class _Depth(threading.local):
    """How often this thread has entered the gate without leaving it."""

    value = 0


_gate = _Gate()
_depth = _Depth()
_closing: _Methods = set()
_renewing: _Methods = set()


def before_forks(close: Callable[[], None]) -> None:
    """Have a method called before forks, when nobody is at work, for as long as its object lives."""
    _add(close, _closing)


def after_forks_in_child(renew: Callable[[], None]) -> None:
    """Have a method called in forked children, first of all, for as long as its object lives."""
    _add(renew, _renewing)


@contextmanager
def at_work() -> Iterator[None]:
    """Whoever forks waits for the end of this context, and who enters it for the end of a fork; may be nested."""
    if not _depth.value:
        _gate.enter()
    _depth.value += 1
    try:
        yield
    finally:
        _depth.value -= 1
        if not _depth.value:
            _gate.leave()


def _before() -> None:
    # A thread that forks at its own work keeps its connection, which the child then leaves alone.
    _gate.close(inside=min(_depth.value, 1))
    if not _depth.value:
        _call_all(_closing)


def _in_child() -> None:
    _gate.renew(inside=min(_depth.value, 1))
    _call_all(_renewing)


def _add(method: Callable[[], None], methods: _Methods) -> None:
    methods.difference_update([reference for reference in list(methods) if reference() is None])
    methods.add(weakref.WeakMethod(method))


def _call_all(methods: _Methods) -> None:
    for reference in list(methods):
        if (method := reference()) is not None:
            method()


os.register_at_fork(before=_before, after_in_parent=_gate.open, after_in_child=_in_child)
