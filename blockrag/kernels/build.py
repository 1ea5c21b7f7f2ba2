"""The C kernels as one shared library, compiled where they run.

Owns finding a compiler, building once per machine and loading what was built. Knows nothing of what the kernels
compute. Everything works without a library, only slower, so nothing here raises: `library()` is None, and `why_not()`
says why and what to do.

The library is compiled for the very processor it runs on, which no wheel could be, in about a second. It is kept in
the user's cache directory (`blockrag.user_cache`).
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

import torch

from blockrag.user_cache import refuse_foreign, user_cache_directory

__all__ = ["library", "why_not"]

_LOGGER = logging.getLogger(__name__)

_SETTING: Final = "BLOCKRAG_CPU_KERNELS"
_SOURCES: Final = Path(__file__).parent
# No -ffast-math: it would drop the infinities and NaNs that masks need.
_FLAGS: Final = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-ffp-contract=fast")
_BUILD_S: Final = 120.0


class _UnavailableError(Exception):
    """There is no library; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    library: ctypes.CDLL | None
    reason: str | None


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there are none; built at the first call of the first process.

    The environment variable BLOCKRAG_CPU_KERNELS=off switches them off; "auto" is the default.
    """
    return _outcome().library


def why_not() -> str | None:
    """Why `library()` is None, in one line; None where there is a library."""
    return _outcome().reason


@lru_cache(maxsize=1)
def _outcome() -> _Outcome:
    try:
        return _Outcome(_load(), None)
    # RuntimeError: no home directory. ValueError: CC has an open quote.
    except (_UnavailableError, OSError, subprocess.SubprocessError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        _LOGGER.info("no compiled CPU kernels, torch does their work: %s", reason)
        return _Outcome(None, reason)


def _load() -> ctypes.CDLL:
    setting = os.environ.get(_SETTING, "auto")
    if setting == "off":
        raise _UnavailableError(f"{_SETTING} is off")
    if setting != "auto":
        raise _UnavailableError(f'{_SETTING} is {setting!r}; set it to "auto" or "off"')
    if platform.system() not in ("Linux", "Darwin"):
        raise _UnavailableError(f"they are not built on {platform.system() or 'an unknown system'}")
    directory = user_cache_directory()
    tools = _tools()
    key = tools.key()
    path = _cached(directory, key) or _build(directory, key, tools)
    return ctypes.CDLL(str(path))


@dataclass(frozen=True, slots=True)
class _Tools:
    """What the library is built with.

    Args:
        compiler: Its command.
        target: What the compiler predefines: its version, and each feature of this processor that it will use.
        openmp: The runtime to link; None for kernels on one thread.
    """

    compiler: tuple[str, ...]
    target: str
    openmp: Path | None

    @property
    def compile(self) -> tuple[str, ...]:
        return (*self.compiler, *_FLAGS, *(("-fopenmp",) if self.openmp else ()))

    def key(self) -> str:
        """Equal keys: the same code from the same compiler for the same processor, linked to the same runtime."""
        digest = hashlib.sha256(repr((self.compile, self.target, str(self.openmp))).encode())
        for source in sorted(_SOURCES.glob("*.[ch]")):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
        return digest.hexdigest()[:24]


def _tools() -> _Tools:
    compiler = _compiler()
    target = _run([*compiler, *_FLAGS, "-dM", "-E", "-x", "c", os.devnull], cwd=_SOURCES)
    # Clang's parallel regions call a runtime of its own, not the one that torch brings.
    return _Tools(compiler, target, None if "__clang__" in target else _openmp())


def _compiler() -> tuple[str, ...]:
    chosen = shlex.split(os.environ.get("CC", ""))
    for command in [chosen] if chosen else [["cc"], ["gcc"], ["clang"]]:
        if program := shutil.which(command[0]):
            return (program, *command[1:])
    missing = f"CC is {chosen[0]!r}, which is not there" if chosen else "there is no cc, gcc or clang"
    raise _UnavailableError(f"{missing}; install a C compiler (Debian: apt install gcc)")


def _openmp() -> Path | None:
    """The OpenMP runtime that torch loaded, so that the kernels run on torch's threads.

    A second runtime would bring threads of its own, spinning on the cores that torch's are spinning on.
    """
    if platform.system() != "Linux":
        return None
    package = Path(torch.__file__).parent
    for directory in (package / "lib", package.parent / "torch.libs"):
        for path in sorted(directory.glob("libgomp*.so*")):
            return path
    return None


def _cached(directory: Path, key: str) -> Path | None:
    """The library as built before. Its name ends in a checksum: loading a damaged library can kill a process."""
    for path in sorted(directory.glob(f"kernels-{key}-*.so")):
        refuse_foreign(path)
        if path.name == _name(key, path.read_bytes()):
            return path
        path.unlink(missing_ok=True)
    return None


def _name(key: str, content: bytes) -> str:
    return f"kernels-{key}-{hashlib.sha256(content).hexdigest()[:24]}.so"


def _build(directory: Path, key: str, tools: _Tools) -> Path:
    """Compile and link beside the final place, then rename: other processes may be building the same."""
    with tempfile.TemporaryDirectory(dir=directory, prefix="building-") as work:
        objects = []
        for source in sorted(_SOURCES.glob("*.c")):
            objects.append(f"{source.stem}.o")
            _run([*tools.compile, "-c", str(source), "-o", objects[-1]], cwd=Path(work))
        # Linked by its file, because -fopenmp would link the compiler's own runtime.
        runtime = [str(tools.openmp)] if tools.openmp else []
        _run([*tools.compiler, "-shared", *objects, *runtime, "-o", "built.so"], cwd=Path(work))
        built = Path(work) / "built.so"
        built.chmod(0o700)
        return built.rename(directory / _name(key, built.read_bytes()))


def _run(command: list[str], *, cwd: Path) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, errors="replace", timeout=_BUILD_S, check=False
    )
    if done.returncode:
        said = done.stderr.strip()[:500] or "it said nothing"
        raise _UnavailableError(
            f"{shlex.join(command[:1])} failed with status {done.returncode} ({said}); set CC to a working C compiler"
        )
    return done.stdout
