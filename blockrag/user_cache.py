"""The user's cache directory: what can be made again, and must not be somebody else's.

`$BLOCKRAG_CACHE_DIR`, else `$XDG_CACHE_HOME/blockrag`, else `~/.cache/blockrag`. Compiled code and digests are taken
from there at their word, so the directory must belong to the user and nobody else may write to it.
"""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path

__all__ = ["refuse_foreign", "user_cache_directory"]


def user_cache_directory() -> Path:
    """The directory, made if need be.

    Raises:
        OSError: It cannot be made, or others could put things into it.
        RuntimeError: The user has no home directory.
    """
    chosen, home = os.environ.get("BLOCKRAG_CACHE_DIR", ""), os.environ.get("XDG_CACHE_HOME", "")
    if Path(chosen).is_absolute():
        directory = Path(chosen)
    else:
        # A relative path counts as unset: https://specifications.freedesktop.org/basedir-spec/latest/
        root = Path(home) if Path(home).is_absolute() else Path.home() / ".cache"
        directory = root / "blockrag"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    refuse_foreign(directory)
    return directory


def refuse_foreign(path: Path) -> None:
    """Refuse what is not this user's own, or what others may change.

    Raises:
        OSError: It is not, they may, or it is not there.
    """
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise PermissionError(f"{path} is a link; remove it")
    if found.st_uid != os.getuid():
        raise PermissionError(
            f"{path} belongs to user {found.st_uid}; remove it, or set BLOCKRAG_CACHE_DIR to a directory of your own"
        )
    if found.st_mode & 0o022:
        raise PermissionError(f"others may write to {path}; run: chmod go-w {shlex.quote(str(path))}")
