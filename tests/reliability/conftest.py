"""The reliability suite: how far its tests go, and the table of what they found.

    pytest                                               the figures that every change must hold, beside the other tests
    pytest tests/reliability --reliability=long          the long figures: hours
      --reliability-results=benchmarks/results/...       also write the table, one row per figure; earlier rows stay

Every test runs against real files and real processes, and has to be able to fail: where a promise is that damage is
noticed, a control shows that it goes unnoticed without the check that notices it.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from figures import FigureTable

_TABLE = pytest.StashKey[FigureTable]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("reliability")
    group.addoption("--reliability", choices=("ci", "long"), default="ci", help="how many faults are tried")
    group.addoption("--reliability-results", metavar="DIR", default=None, help="write the table of figures there")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TABLE] = FigureTable(_scale(config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a machine that does other work as well, these take a while; what hangs inside them is noticed there."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(0 if _scale(config) == "long" else 1200))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        _collected.extend(figure for name, figure in report.user_properties if name == "reliability")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _collected:
        return
    terminalreporter.section(f"reliability ({_scale(config)})")
    for figure in _collected:
        terminalreporter.write_line(f"{figure['what']}: {figure['tried']:,} {figure['unit']}: {figure['result']}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    directory = session.config.getoption("reliability_results", None)
    # Tests that run beside others in workers hand their figures to the session that started the workers.
    if directory is not None and not hasattr(session.config, "workerinput") and _collected:
        session.config.stash[_TABLE].write(Path(directory), _collected)


# Reports know their test and nothing of the session, so what they carry is collected here.
_collected: list[dict[str, Any]] = []


def _scale(config: pytest.Config) -> str:
    # Where the whole suite runs, this file is read after the command line was, and the option is not there.
    return str(config.getoption("reliability", "ci"))


@pytest.fixture(scope="session")
def scale(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`scale(ci=200, long=5000)` is the one that this run asks for."""
    chosen = _scale(request.config)

    def choose(*, ci: Any, long: Any) -> Any:
        return long if chosen == "long" else ci

    return choose


@pytest.fixture
def fast_path(tmp_path: Path) -> Iterator[Path]:
    """A directory that is fast to synchronise, for tests that open a store thousands of times."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    directory = Path(tempfile.mkdtemp(prefix="blockrag-", dir=memory))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """`record(what, tried=..., unit=..., result=...)`: a row of the table, kept if the test passes."""
    started = time.monotonic()

    def keep(what: str, *, tried: int, unit: str, result: str) -> None:
        seconds = round(time.monotonic() - started, 1)
        figure = {"what": what, "tried": tried, "unit": unit, "result": result, "seconds": seconds}
        request.node.user_properties.append(
            ("reliability", {**figure, "test": request.node.nodeid, "scale": _scale(request.config)})
        )

    return keep
