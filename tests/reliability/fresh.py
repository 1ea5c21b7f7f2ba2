"""Calls a function in a process of its own, so that one that crashes or breaks its process is only a result.

`call` starts a fresh interpreter; arguments and result travel as JSON. `forked` is for use inside such a process: it
runs a function in a fork, which costs a millisecond where a fresh interpreter costs seconds.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Ended", "call", "forked"]

_HERE = Path(__file__).parent
_RESULT = "result: "


def call(target: str, *, environment: Mapping[str, str] | None = None, **arguments: Any) -> Any:
    """The result of "module:function" of this folder, called by a fresh interpreter.

    Raises:
        AssertionError: The process crashed, was killed, or raised; the message ends with what it printed.
    """
    command = [sys.executable, "-W", "error", str(_HERE / "fresh.py"), target]
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        input=json.dumps(arguments),
        env={**os.environ, **quiet, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
        raise AssertionError(f"{target} ended with {ended}:\n{done.stderr[-3000:]}")
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(_RESULT))
    return json.loads(line[len(_RESULT) :])


@dataclass(frozen=True, slots=True)
class Ended:
    """How a fork ended.

    Args:
        signal: What killed it; 0 for nothing.
        result: What its function returned; None where it was killed.
    """

    signal: int
    result: Any


def forked(work: Callable[[], Any], *, kill_after_s: float | None = None, hang_s: float = 300.0) -> Ended:
    """Run `work` in a fork; kill it with SIGKILL after a while, if it has not ended by then.

    Args:
        work: Returns something that JSON can hold.
        kill_after_s: When to kill it; None for never.
        hang_s: After how many seconds a fork that nobody kills counts as hanging.

    Raises:
        AssertionError: It raised (its traceback is on stderr), or hangs.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(reading)
            os.write(writing, json.dumps(work()).encode())
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    fired: list[float] = []

    def kill() -> None:
        fired.append(time.monotonic())
        os.kill(child, signal.SIGKILL)

    # A timer's thread ends before the next fork is made, so that forks never copy a process with two threads.
    timer = threading.Timer(hang_s if kill_after_s is None else kill_after_s, kill)
    timer.start()
    with os.fdopen(reading, "rb") as stream:
        written = stream.read()
    # Not waited for, the process stays a zombie, and its number nobody else's.
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    timer.cancel()
    timer.join()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"the fork crashed with signal {os.WTERMSIG(status)}"
        assert not (fired and kill_after_s is None), f"the fork hangs: it was killed after {hang_s} s"
        return Ended(signal.SIGKILL, None)
    assert os.WEXITSTATUS(status) == 0, "the fork raised"
    return Ended(0, json.loads(written))


if __name__ == "__main__":
    sys.path[:0] = [str(_HERE.parent)]
    module, _, name = sys.argv[1].partition(":")
    result = getattr(importlib.import_module(module), name)(**json.load(sys.stdin))
    sys.stdout.write(f"\n{_RESULT}{json.dumps(result)}\n")
