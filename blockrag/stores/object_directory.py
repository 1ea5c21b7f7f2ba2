"""`ObjectDirectory`: the directory of a `file:///` store: whose it is, and which names lead to a file in it.

obstore follows symbolic links and opens whatever lies under a name. So every name is looked at before obstore gets it:
that stops what lies there, not somebody who swaps a link in at that very moment.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from blockrag.errors import StoreError, UnsafeStoreError

__all__ = ["ObjectDirectory"]


class ObjectDirectory:
    """A directory that is empty or a store, made if it is not there; its owner's only (0700).

    Args:
        path: Where it is.
        marker: The file that says that it is a store.

    Raises:
        StoreError: It is neither, or cannot be used.
    """

    def __init__(self, path: Path, *, marker: str) -> None:
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.root = Path(os.path.realpath(path))
            # Where somebody else is just making it, the marker comes first, but for the file that obstore stages it in.
            others = any(not path.name.startswith(f"{marker}#") for path in self.root.iterdir())
            if others and not (self.root / marker).is_file():
                raise StoreError(f"{path} is neither empty nor a store; choose another directory")
            self.root.chmod(0o700)
        except OSError as error:
            message = f"cannot use {path} as a store ({error}); choose a directory that can be written"
            raise StoreError(message) from error

    def check(self, name: str) -> None:
        """Let a name pass that leads to a regular file below the root, or to nothing.

        Raises:
            UnsafeStoreError: It leads elsewhere, or to a link, a pipe or a directory.
        """
        path = self.root / name
        sound = os.path.realpath(path.parent) == str(path.parent)
        with suppress(FileNotFoundError):
            sound = sound and stat.S_ISREG(path.lstat().st_mode)
        if not sound:
            raise UnsafeStoreError(f"{path} is no file of this store; do not trust this directory, delete it")

    def tighten(self, name: str) -> None:
        """Make a file its owner's only: obstore makes it as the process's umask says."""
        with suppress(FileNotFoundError):
            (self.root / name).chmod(0o600)
