"""What to do about stored KV states, given what they cost and what they save: none, lazy, the hot part, or all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["Advice", "Choice", "advise", "times"]

Choice: TypeAlias = Literal["none", "lazy", "hot part", "all"]
"""none: compute every time. lazy: store a block when it is first asked for. hot part: a budget, the least recently used
blocks go. all: compute and store everything beforehand."""

# Longer than this is worth doing only for passages that somebody asks for.
_LONG_BUILD_S = 3600.0
# A budget that catches less is not worth its disk.
_LEAST_HIT_RATE = 0.05


@dataclass(frozen=True, slots=True)
class Advice:
    """A recommendation.

    Args:
        choice: What to do.
        reason: Why, in a sentence.
        budget: For the hot part, the bytes to give the store.
    """

    choice: Choice
    reason: str
    budget: int | None = None


def advise(
    *, gain: float, fits: bool, build_s: float, room: int | None, hit_rate: float, exponent: float = 0.8
) -> Advice:
    """Choose.

    Args:
        gain: Time to compute passages as a multiple of the time to load them.
        fits: Whether all blocks fit.
        build_s: Seconds to compute and store all that are missing.
        room: Bytes that the store may take; None where it cannot be told.
        hit_rate: Share of the requests that so many bytes catch.
        exponent: Zipf's exponent that the hit rate was estimated with.
    """
    if gain <= 1:
        return Advice(
            "none",
            f"loading from this store takes {times(1 / gain)} as long as computing; use a faster store "
            "(memory://, a local disk), or fewer bytes (--precision int8)",
        )
    room_for_all = "everything fits" if room is not None else "how much room it has is not known"
    faster = f"loading is {times(gain)} as fast as computing"
    if fits and build_s <= _LONG_BUILD_S:
        return Advice("all", f"{faster}, {room_for_all}, and building it takes less than an hour")
    if fits:
        return Advice(
            "lazy",
            f"{faster}, {room_for_all}, but building it takes {build_s / 3600:,.1f} hours: store blocks when they "
            "are first asked for, and build ahead what is asked for most",
        )
    if room is None or hit_rate < _LEAST_HIT_RATE:
        return Advice("none", f"{faster}, but the room there is would catch {hit_rate:.0%} of the requests; add disk")
    return Advice(
        "hot part",
        f"{faster}, but not everything fits: a budget of what does catches {hit_rate:.0%} of the requests if they "
        f"follow Zipf's law with exponent {exponent:g}",
        budget=room,
    )


def times(factor: float) -> str:
    """A factor in words, with as many digits as it deserves."""
    return f"{factor:,.0f} times" if factor >= 10 else f"{factor:.1f} times"
