"""What disks, crashes and people with editors do to bytes: mutations that can be drawn, shrunk, repeated and printed.

A `Mutation` is five numbers and applies to any bytes, whatever their length. `mutations` draws them for hypothesis,
`random_mutation` from a seeded generator, for runs that are longer than hypothesis is made for.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, get_args

from hypothesis import strategies as st

__all__ = ["Kind", "Mutation", "mutated", "mutations", "random_mutation"]

Kind = Literal["flip", "set", "fill", "number", "cut", "append", "remove", "insert", "copy", "swap pages", "zero page"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Files begin with what everything else hangs on, and are mostly something else.
_BEGINNING = 600
_FAR = 2**32 - 1
_PAGE = 4096
# Where sizes and counts are read, these are the edges.
_NUMBERS = (0, 1, 2, 127, 128, 255, 2**15 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63)


@dataclass(frozen=True, slots=True)
class Mutation:
    """One change. Every number is taken modulo what makes sense for the bytes at hand.

    Args:
        kind: flip: one bit. set: one byte. fill: a run of one byte. number: an integer at the edge of its type. cut:
            the end is gone. append, insert: bytes from elsewhere in the file. remove: a run is gone. copy: a run over
            another place. swap pages, zero page: whole pages of 4 KiB.
        at: Where.
        other: Where else.
        length: How much.
        value: Which bit, byte or number.
    """

    kind: Kind
    at: int
    other: int
    length: int
    value: int

    def apply(self, data: bytes) -> bytes:
        """The bytes after the change; empty ones stay empty."""
        if not data:
            return data
        at, other = self.at % len(data), self.other % len(data)
        length = 1 + self.length % 4096
        piece = data[other : other + length]
        if self.kind == "flip":
            return data[:at] + bytes([data[at] ^ 1 << self.value % 8]) + data[at + 1 :]
        if self.kind == "set":
            return data[:at] + bytes([self.value % 256]) + data[at + 1 :]
        if self.kind == "fill":
            return data[:at] + bytes([self.value % 256]) * len(data[at : at + length]) + data[at + length :]
        if self.kind == "number":
            width = (1, 2, 4, 8)[self.length % 4]
            number = _NUMBERS[self.value % len(_NUMBERS)] % (1 << 8 * width)
            return data[:at] + number.to_bytes(width, "big" if other % 2 else "little") + data[at + width :]
        if self.kind == "cut":
            return data[:at]
        if self.kind == "append":
            return data + piece
        if self.kind == "remove":
            return data[:at] + data[at + length :]
        if self.kind == "insert":
            return data[:at] + piece + data[at:]
        if self.kind == "copy":
            return data[:at] + piece + data[at + len(piece) :]
        first, second = sorted((at // _PAGE * _PAGE, other // _PAGE * _PAGE))
        if self.kind == "zero page":
            return data[:first] + bytes(len(data[first : first + _PAGE])) + data[first + _PAGE :]
        between = data[first + _PAGE : second]
        return (
            data
            if first == second
            else data[:first]
            + data[second : second + _PAGE]
            + between
            + data[first : first + _PAGE]
            + data[second + _PAGE :]
        )


def mutated(data: bytes, changes: list[Mutation]) -> bytes:
    """The bytes after all changes, one after another."""
    for change in changes:
        data = change.apply(data)
    return data


def mutations(*, most: int = 3) -> st.SearchStrategy[list[Mutation]]:
    """One to `most` changes, for hypothesis."""
    place = st.one_of(st.integers(0, _BEGINNING), st.integers(0, _FAR))
    change = st.builds(
        Mutation, st.sampled_from(KINDS), at=place, other=place, length=st.integers(0, 4095), value=st.integers(0, 255)
    )
    return st.lists(change, min_size=1, max_size=most)


def random_mutation(generator: random.Random) -> Mutation:
    """One change, the same for the same state of the generator."""

    def place() -> int:
        return generator.randint(0, _BEGINNING if generator.random() < 0.3 else _FAR)

    return Mutation(generator.choice(KINDS), place(), place(), generator.randint(0, 4095), generator.randint(0, 255))
