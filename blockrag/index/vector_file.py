"""The file of a vector index: a header and plain arrays of numbers, under one checksum.

    512 bytes   header: JSON, padded with spaces (magic, kind, dimension, rows, entries, stamp, ..., bytes, checksum)
    arrays      little-endian, one after another; what they are follows from the header alone

No library's own format: those are read by code that trusts them. Here every length is known, and compared with the
file's, before memory is taken for it; what the numbers mean is for the caller to check. The checksum is over everything
and comes out at the end, so that a file is read once.

Nothing here knows FAISS or SQLite.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from blockrag.index.files import create_private, open_regular

__all__ = ["VectorFile", "VectorFileError", "open_vector_file", "read_kind", "write_vector_file"]

_MAGIC = "blockrag vectors 2"
_HEADER_BYTES = 512
_CHUNK_BYTES = 1 << 20


class VectorFileError(Exception):
    """The vector file cannot be used; never leaves `blockrag.index`, where it means: rebuild.

    Attributes:
        ordinary: The file is missing or behind the database, as after a process that ended without close(): nothing
            is damaged.
    """

    def __init__(self, message: str, *, ordinary: bool = False) -> None:
        super().__init__(message)
        self.ordinary = ordinary


class VectorFile:
    """A vector file that is being read, array by array in the order in which they were written.

    Args:
        file: It, behind the header.
        header: What the header says.
        size: Bytes after the header.
    """

    def __init__(self, file: IO[bytes], header: Mapping[str, Any], size: int) -> None:
        import xxhash

        self.header = header
        self._file = file
        self._left = size
        self._digest = xxhash.xxh3_128()

    def count(self, name: str) -> int:
        """A number of the header that counts what the file holds.

        Raises:
            VectorFileError: It is none.
        """
        value = self.header.get(name)
        # Everything that is counted takes a byte or more.
        if type(value) is not int or not 0 <= value <= self.header["bytes"]:
            raise VectorFileError(f"its header says {name} {value!r:.40}")
        return value

    def array(self, dtype: str, *shape: int) -> NDArray[Any]:
        """The next array.

        Args:
            dtype: numpy's name, little-endian.
            shape: Its shape.

        Raises:
            VectorFileError: The file is too short for it.
        """
        wanted = np.dtype(dtype).itemsize * math.prod(shape)
        if wanted > self._left:
            raise VectorFileError(f"it has {self._left} bytes left for an array of {wanted}")
        array = np.empty(shape, dtype=dtype)
        view = array.reshape(-1).view(np.uint8).data
        done = 0
        while done < wanted:
            count = self._file.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                raise VectorFileError(f"it ends {wanted - done} bytes early")
            done += count
        self._left -= wanted
        self._digest.update(view)
        return array.astype(array.dtype.newbyteorder("="), copy=False)

    def matrix_chunks(self, rows: int, columns: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """The next array, `[rows, columns]` float32, in chunks, each with the number of its first row.

        Raises:
            VectorFileError: The file is too short for it.
        """
        if 4 * rows * columns > self._left:
            raise VectorFileError(f"it has {self._left} bytes left for {rows} vectors of {columns} numbers")
        step = max(1, _CHUNK_BYTES // (4 * columns))
        for start in range(0, rows, step):
            yield start, self.array("<f4", min(step, rows - start), columns)

    def check(self) -> None:
        """See that all of the file was read, and is what was written.

        Raises:
            VectorFileError: It is not.
        """
        if self._left:
            raise VectorFileError(f"{self._left} bytes in it belong to nothing")
        if _checksum(self._digest, self.header) != self.header.get("checksum"):
            raise VectorFileError("its checksum does not match")


def write_vector_file(path: Path, header: Mapping[str, object], arrays: Iterable[NDArray[Any]]) -> None:
    """Write a file atomically: a crash leaves the old one.

    Args:
        path: The file; its directory exists.
        header: What describes the arrays.
        arrays: They, each of a little-endian dtype.

    Raises:
        OSError: The file cannot be written.
    """
    import xxhash

    digest = xxhash.xxh3_128()
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with create_private(partial) as file:
            file.write(bytes(_HEADER_BYTES))
            for array in arrays:
                if array.size:
                    view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
                    digest.update(view)
                    file.write(view)
            full = {"magic": _MAGIC, **header, "bytes": file.tell() - _HEADER_BYTES}
            file.seek(0)
            file.write(_encoded({**full, "checksum": _checksum(digest, full)}))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def open_vector_file(path: Path, wanted: Mapping[str, object]) -> Iterator[VectorFile]:
    """Open a file whose header says what is wanted.

    Raises:
        VectorFileError: The file is missing, damaged, or holds something else; says which. Also for what the system
            reports while it is read.
    """
    try:
        with open_regular(path) as file:
            header = _read_header(file)
            for name, value in {"magic": _MAGIC, **wanted}.items():
                if header.get(name) != value:
                    raise VectorFileError(
                        f"{name} is {header.get(name)!r:.60}, not {value!r}", ordinary=name == "stamp"
                    )
            size = os.fstat(file.fileno()).st_size - _HEADER_BYTES
            if type(header.get("bytes")) is not int or size != header["bytes"]:
                raise VectorFileError(f"it is {size} bytes long instead of {header.get('bytes')!r:.40}")
            yield VectorFile(file, header, size)
    except FileNotFoundError:
        raise VectorFileError("there is none", ordinary=True) from None
    except OSError as error:
        raise VectorFileError(f"it cannot be read: {error}") from error


def read_kind(path: Path) -> str | None:
    """The kind that a file's header names, whatever else is wrong with it; None where it cannot be read."""
    try:
        with open_regular(path) as file:
            return str(_read_header(file).get("kind"))
    except (OSError, VectorFileError):
        return None


def _read_header(file: IO[bytes]) -> dict[str, Any]:
    raw = file.read(_HEADER_BYTES)
    try:
        header = json.loads(raw.decode("ascii"))
        # Byte for byte what is written: the checksum then covers the header too.
        if not isinstance(header, dict) or _encoded(header) != raw:
            raise ValueError("it is not as it was written")
    except (ValueError, RecursionError) as error:
        raise VectorFileError(f"its header is damaged ({error})") from error
    return header


def _encoded(header: Mapping[str, object]) -> bytes:
    return json.dumps(header).encode().ljust(_HEADER_BYTES)


def _checksum(payload: Any, header: Mapping[str, object]) -> str:
    """Over the arrays and then the header, as 32 hex digits."""
    digest = payload.copy()
    digest.update(_encoded({name: value for name, value in header.items() if name != "checksum"}))
    return str(digest.hexdigest())
