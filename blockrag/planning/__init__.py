"""What documents will cost as stored KV states, before any are stored, and whether storing them pays on this machine.

    inventory.py  documents, passages, blocks and tokens, counted as a pass over them would find them
    target.py     where the blocks would go, and how much room is there
    measure.py    five seconds of this machine: computing blocks, storing them, loading them
    hit_rate.py   what a byte budget catches when some passages are asked for more often than others
    advice.py     none, lazy, the hot part, or all
    planner.py    puts these together

Nothing is written but a temporary store, which is gone afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockrag.planning.planner import Plan, Workload, plan
    from blockrag.planning.target import Target

__all__ = ["Plan", "Target", "Workload", "plan"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from blockrag.planning import planner, target

    return getattr(target if name == "Target" else planner, name)
