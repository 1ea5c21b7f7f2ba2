"""Who is at work with a store's connections, so that they are closed, and the process forks, when nobody is.

A connection that is closed while another thread runs a statement on it takes the process down.

Nor can SQLite be carried through a fork (sqlite.org/howtocorrupt.html, 2.6). A child takes its parent's file locks for
its own, though the system gave it none; the parent then removes the write-ahead log under it when it closes, and what
both write afterwards destroys the index. And a mutex that another thread held at the fork stays held in the child. So
a fork waits until other threads are done, and closes the connections; parent and child open new ones as they go on.

Nothing here knows what the work is.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["Gate"]


class _Depth(threading.local):
    """How often this thread has entered a gate without leaving it."""

    value = 0


class Gate:
    """Counts the threads at work, and keeps new ones out while somebody needs them all to rest.

    Locks that are taken at work are taken after it has begun: who holds one and waits at the gate would hold up those
    who are waited for.
    """

    def __init__(self) -> None:
        self._depth = _Depth()
        # Called before forks, and in their children; on objects that go when they want.
        self._closing: list[weakref.WeakMethod[Callable[[], None]]] = []
        self._renewing: list[weakref.WeakMethod[Callable[[], None]]] = []
        self._renew()
        _gates.add(self)

    def before_forks(self, close: Callable[[], None]) -> None:
        """Have a method called before forks, when nobody is at work."""
        self._closing = [known for known in self._closing if known() is not None] + [weakref.WeakMethod(close)]

    def after_forks_in_child(self, renew: Callable[[], None]) -> None:
        """Have a method called in forked children, before anything else is done."""
        self._renewing = [known for known in self._renewing if known() is not None] + [weakref.WeakMethod(renew)]

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Whoever needs rest waits for the end of this context, or this for the end of the rest; may be nested."""
        if not self._depth.value:
            with self._condition:
                while self._shut:
                    self._condition.wait()
                self._inside += 1
        self._depth.value += 1
        try:
            yield
        finally:
            self._depth.value -= 1
            if not self._depth.value:
                with self._condition:
                    self._inside -= 1
                    if self._shut:
                        self._condition.notify_all()

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """No other thread is at work within this context; what this one holds, no other may need to end its work."""
        self._shut_out()
        try:
            yield
        finally:
            self._let_in()

    def _own(self) -> int:
        """1 if this thread is at work, else 0."""
        return min(self._depth.value, 1)

    def _shut_out(self) -> None:
        with self._condition:
            self._condition.wait_for(lambda: not self._shut)
            self._shut = True
            self._condition.wait_for(lambda: self._inside <= self._own())

    def _let_in(self) -> None:
        with self._condition:
            self._shut = False
            self._condition.notify_all()

    def _renew(self) -> None:
        self._condition = threading.Condition()
        self._inside = self._own()
        self._shut = False

    def _before_fork(self) -> None:
        self._shut_out()
        # A thread that forks at its own work keeps its connection, which the child then leaves alone.
        if not self._own():
            _call_all(self._closing)

    def _in_child(self) -> None:
        self._renew()
        _call_all(self._renewing)


_gates: Final[weakref.WeakSet[Gate]] = weakref.WeakSet()
_one_fork: Final = threading.RLock()
_shut: Final[list[Gate]] = []


def _call_all(methods: list[weakref.WeakMethod[Callable[[], None]]]) -> None:
    for reference in methods:
        if (method := reference()) is not None:
            method()


def _before() -> None:
    _one_fork.acquire()
    _shut.extend(_gates)
    for gate in _shut:
        gate._before_fork()


def _in_parent() -> None:
    for gate in _shut:
        gate._let_in()
    _shut.clear()
    _one_fork.release()


def _in_child() -> None:
    for gate in _shut:
        gate._in_child()
    _shut.clear()
    _one_fork.release()


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
