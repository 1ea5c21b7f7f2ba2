"""`plan`: what storing the KV states of some documents costs here, whether they fit, and whether it pays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, get_args

from blockrag.codec import Precision
from blockrag.errors import InputError, StoreError
from blockrag.model.block_model import BlockModel
from blockrag.model.outline import ModelOutline
from blockrag.planning.advice import Advice, advise
from blockrag.planning.hit_rate import lru_hit_rate
from blockrag.planning.inventory import Inventory, take_inventory
from blockrag.planning.measure import Rates, measure_rates
from blockrag.planning.target import Target, available_memory

if TYPE_CHECKING:
    from blockrag.encoders import Encoder
    from blockrag.ingest.progress import Progress
    from blockrag.ingest.reading import DocumentReader, Source
    from blockrag.prompt import Block
    from blockrag.stores.protocol import BlockStore

__all__ = ["SAMPLE_BYTES", "USABLE_SHARE", "Budget", "Plan", "Speed", "Workload", "plan"]

USABLE_SHARE = 0.8
"""The part of the free space that blocks may take: a disk that is full fails everybody on it."""

SAMPLE_BYTES = 32 << 20
"""Text that is cut and tokenized of a large corpus."""

_SHARES = (0.1, 0.25, 0.5)
# What a row of the passages' database takes beside its text and vector.
_INDEX_ROW_BYTES = 512


@dataclass(frozen=True, slots=True)
class Workload:
    """How passages will be asked for.

    Args:
        k: Passages per prompt.
        zipf: Exponent of Zipf's law that requests follow; 0 where all passages are asked for alike.

    Raises:
        InputError: A number is out of range.
    """

    k: int = 5
    zipf: float = 0.8

    def __post_init__(self) -> None:
        if self.k < 1 or not 0 <= self.zipf < float("inf"):
            raise InputError(f"nothing asks for k={self.k} passages with zipf={self.zipf}; pass k >= 1 and zipf >= 0")


@dataclass(frozen=True, slots=True)
class Speed:
    """What the measured rates mean for these documents.

    Args:
        rates: What was measured.
        build_s: Seconds to compute, store and index what is missing.
        load_s: Seconds until k passages are loaded and in place.
        compute_s: Seconds until they are computed instead.
        break_even_bytes_per_s: What a store must deliver for loading to take no longer than computing.
    """

    rates: Rates
    build_s: float
    load_s: float
    compute_s: float
    break_even_bytes_per_s: float

    @property
    def gain(self) -> float:
        """Time to compute as a multiple of the time to load."""
        return self.compute_s / self.load_s


@dataclass(frozen=True, slots=True)
class Budget:
    """What a store of limited size would do.

    Args:
        nbytes: Its byte budget.
        share: The part of all blocks that fits it.
        hit_rate: Share of the requests it would answer, if they follow Zipf's law.
        mean_s: Mean seconds until k passages are in place; None where nothing was measured.
    """

    nbytes: int
    share: float
    hit_rate: float
    mean_s: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """The result of `plan`.

    Args:
        precision: At rest.
        workload: How passages will be asked for.
        inventory: What the documents consist of.
        nbytes: Bytes of all distinct blocks, headers included, in each precision.
        new_bytes: Bytes in the chosen precision of those that are not stored yet.
        index_bytes: About what the passages' index takes.
        second_copy_beyond: Tokens of a prompt beyond which the model needs blocks of their own, computed by the first
            such prompt; None for most models.
        target: Where blocks would go.
        free_bytes: Room there; None where it cannot be told.
        free_memory: Memory of this machine that is free; None where it cannot be told.
        needed_bytes: What must fit: the new blocks, or the largest budget where that is less, and the index where it is
            on the same disk.
        budgets: What smaller stores would do.
        speed: What was measured; None where nothing was.
        not_measured: Why nothing was; empty where something was.
        advice: What to do; None where nothing was measured.
    """

    precision: Precision
    workload: Workload
    inventory: Inventory
    nbytes: Mapping[Precision, int]
    new_bytes: int
    index_bytes: int
    second_copy_beyond: int | None
    target: Target
    free_bytes: int | None
    free_memory: int | None
    needed_bytes: int
    budgets: tuple[Budget, ...]
    speed: Speed | None
    not_measured: str
    advice: Advice | None

    @property
    def fits(self) -> bool:
        """Whether what must fit takes no more than `USABLE_SHARE` of the room; true where the room is not known."""
        return self.free_bytes is None or self.needed_bytes <= USABLE_SHARE * self.free_bytes

    @property
    def kv_per_text(self) -> float:
        """Bytes of KV states per byte of text."""
        return self.nbytes[self.precision] / max(1, self.inventory.text_bytes)


def plan(
    sources: Source | Iterable[Source],
    model: BlockModel | ModelOutline,
    *,
    target: Target,
    workload: Workload | None = None,
    encoder: Encoder | None = None,
    max_passage_tokens: int = 256,
    budgets: Sequence[int] = (),
    seconds: float = 5.0,
    sample_bytes: int | None = SAMPLE_BYTES,
    progress: Progress | None = None,
    readers: Mapping[str, DocumentReader] | None = None,
) -> Plan:
    """Count, measure, compare.

    Args:
        sources: What `read_documents` takes.
        model: A model that keeps no finished prompts (`kept_bytes=0`), or, to measure nothing, the outline of one.
        target: Where blocks would go.
        workload: How passages will be asked for.
        encoder: Embeds passages; None where the index is somebody else's.
        max_passage_tokens: Most tokens of a passage's text.
        budgets: Byte budgets to compare; by default the target's own. What must fit is then the largest of them.
            Where there is none it is everything, and some parts of it are compared.
        seconds: How long to measure, about.
        sample_bytes: Text that is cut and tokenized at most; None for all of it, however much that is.
        progress: Told how far the counting is.
        readers: Reader per suffix, for file types that are not text.

    Raises:
        InputError: A number is out of range, or the sources hold no usable text.
        StoreError: What is stored already cannot be told. (A target that cannot be measured is no error: a full disk is
            what one wants to know about.)

    Warns:
        BeyondTrainingWarning: A prompt has more passages than the model was block-fine-tuned on.
    """
    asked = workload or Workload()
    if min(budgets, default=1) < 1:
        raise InputError(f"a budget is {min(budgets)} bytes; pass at least 1")
    loaded, outline = (model, ModelOutline.of(model)) if isinstance(model, BlockModel) else (None, model)
    with ExitStack() as stack:
        store = None if loaded is None else stack.enter_context(target.existing_store())
        inventory = take_inventory(
            sources,
            outline,
            max_passage_tokens=max_passage_tokens,
            sample_bytes=sample_bytes,
            stored=None if loaded is None or store is None else partial(_stored, loaded, store),
            progress=progress,
            readers=readers,
        )
    if not inventory.blocks:
        reasons = "".join(f"; {failure}" for failure in inventory.failures[:3])
        raise InputError(f"the sources hold no text that can be stored{reasons}; pass files or folders with text")
    measured: Rates | str = "the model's weights were not loaded"
    if loaded is not None:
        try:
            with target.scratch_store() as scratch:
                measured = measure_rates(
                    loaded,
                    inventory.blocks,
                    scratch,
                    k=asked.k,
                    seconds=seconds,
                    encoder=encoder,
                    passages=inventory.passages_kept,
                )
        except StoreError as error:
            measured = str(error)
    dimension = None if encoder is None else encoder.dimension
    limits = tuple(budgets) or (() if target.max_bytes is None else (target.max_bytes,))
    return _evaluate(inventory, outline, target, asked, measured, dimension=dimension, budgets=limits)


def _stored(model: BlockModel, store: BlockStore, blocks: Sequence[Block]) -> list[int]:
    """The places of the blocks that the store has."""
    keys = [model.block_key(block.token_ids) for block in blocks]
    found = store.contains_many(keys)
    return [place for place, key in enumerate(keys) if key in found]


def _evaluate(
    inventory: Inventory,
    outline: ModelOutline,
    target: Target,
    asked: Workload,
    measured: Rates | str,
    *,
    dimension: int | None,
    budgets: Sequence[int],
) -> Plan:
    """The arithmetic, once everything is counted and measured."""
    layout, precision = outline.profile.layout, outline.precision
    nbytes = {one: inventory.nbytes(layout, one) for one in get_args(Precision)}
    total = nbytes[precision]
    new_bytes = total - inventory.stored_nbytes(layout, precision)
    index_bytes = 0 if dimension is None else _index_bytes(inventory, dimension)
    # On the same disk; elsewhere it takes other room.
    beside = index_bytes if target.scheme == "disk" else 0
    needed = (min(new_bytes, max(budgets)) if budgets else new_bytes) + beside
    free = target.free_bytes()
    # What is stored already has its place; a store's own budget is a limit as well.
    usable = [] if free is None else [max(0, int(USABLE_SHARE * free) - beside) + total - new_bytes]
    room = min([*usable, *([] if target.max_bytes is None else [target.max_bytes])], default=None)
    speed = None if isinstance(measured, str) else _speed(measured, inventory, total, asked.k)
    advice = None
    if speed is not None:
        advice = advise(
            gain=speed.gain,
            fits=room is None or total <= room,
            build_s=speed.build_s,
            room=room,
            hit_rate=_hit_rate(inventory, total, total if room is None else room, asked.zipf),
            exponent=asked.zipf,
        )
    compared = budgets or [round(share * total) for share in _SHARES]
    return Plan(
        precision=precision,
        workload=asked,
        inventory=inventory,
        nbytes=nbytes,
        new_bytes=new_bytes,
        index_bytes=index_bytes,
        second_copy_beyond=outline.profile.regime_limit,
        target=target,
        free_bytes=free,
        free_memory=available_memory(),
        needed_bytes=needed,
        budgets=tuple(_budget(one, inventory, total, asked.zipf, speed) for one in compared),
        speed=speed,
        not_measured=measured if isinstance(measured, str) else "",
        advice=advice,
    )


def _index_bytes(inventory: Inventory, dimension: int) -> int:
    """About what passages take beside their blocks: text and terms, and the vector twice (database and search)."""
    return inventory.passages * (2 * 4 * dimension + _INDEX_ROW_BYTES) + 2 * inventory.text_bytes


def _speed(rates: Rates, inventory: Inventory, total: int, k: int) -> Speed:
    tokens = inventory.tokens / inventory.distinct_blocks
    nbytes = total / inventory.distinct_blocks
    build_s = (inventory.tokens - inventory.stored_tokens) / rates.build_tokens_per_s
    if rates.encode_passages_per_s is not None:
        build_s += inventory.passages / rates.encode_passages_per_s
    return Speed(
        rates=rates,
        build_s=build_s,
        load_s=k * nbytes / rates.load_bytes_per_s,
        compute_s=k * tokens / rates.prefill_tokens_per_s,
        break_even_bytes_per_s=nbytes / tokens * rates.prefill_tokens_per_s,
    )


def _hit_rate(inventory: Inventory, total: int, nbytes: int, zipf: float) -> float:
    blocks = inventory.distinct_blocks
    return lru_hit_rate(blocks, blocks * nbytes / total, exponent=zipf)


def _budget(nbytes: int, inventory: Inventory, total: int, zipf: float, speed: Speed | None) -> Budget:
    hit_rate = _hit_rate(inventory, total, nbytes, zipf)
    mean_s = None if speed is None else hit_rate * speed.load_s + (1 - hit_rate) * speed.compute_s
    return Budget(nbytes, min(1.0, nbytes / total), hit_rate, mean_s)
