"""Exact match without generating: many questions to a forward.

Given an answer's own tokens, each is compared with the most likely one. All of them agree, its end included, exactly
when greedy decoding writes this answer; so that one forward over a row scores every question in it. Beside exact match
there is the likelihood of the answer, which moves before answers do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch.nn import functional

from blockrag.errors import InputError
from blockrag.finetune.collate import collate, layout_of, spans_of
from blockrag.finetune.loss import labelled_columns
from blockrag.finetune.rows import Item
from blockrag.finetune.samples import Sample
from blockrag.model.masks import mask_argument

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockrag.model.cache import LayerStructure

__all__ = ["Mode", "Score", "score"]

Mode: TypeAlias = Literal["full", "block", "block-no-reencode"]
"""How passages are attended to; "block-no-reencode": blocks keep the positions they were computed at, from 0 on
(arXiv 2409.15355, "w/o-pos")."""


@dataclass(frozen=True, slots=True)
class Score:
    """How a model does on one question.

    Args:
        kind: The question's kind.
        right: Whether greedy decoding would write exactly the expected answer.
        loss: Negative log-likelihood of the answer and its end, in nats.
        num_tokens: Tokens of the answer, its end included.
    """

    kind: str
    right: bool
    loss: float
    num_tokens: int


@torch.no_grad()
def score(
    model: PreTrainedModel,
    structure: LayerStructure,
    samples: Sequence[Sample],
    mode: Mode,
    *,
    pad_id: int,
    batch_rows: int = 4,
    forward: Callable[..., Any] | None = None,
) -> Iterator[list[Score]]:
    """Score the questions of samples.

    Args:
        model: The model, in evaluation mode.
        structure: Its layers and windows.
        samples: Their answers are what counts as right.
        mode: How to attend.
        pad_id: Token that fills rows up.
        batch_rows: Samples to a forward.
        forward: What to call instead of the model, where it is wrapped.

    Yields:
        The scores of each sample's questions, sample by sample.

    Raises:
        InputError: There is no such mode.
    """
    if mode not in get_args(Mode):
        raise InputError(f"mode={mode!r} is none of {', '.join(map(repr, get_args(Mode)))}")
    for first in range(0, len(samples), batch_rows):
        rows = [
            (Item(sample.without_marker(), "full") if mode == "full" else Item(sample, "block"),)
            for sample in samples[first : first + batch_rows]
        ]
        positions: Literal["global", "local"] = "local" if mode == "block-no-reencode" else "global"
        batch = {
            name: tensor.to(model.device) for name, tensor in collate(rows, pad_id=pad_id, positions=positions).items()
        }
        losses, hits = _answer_tokens(forward or model, model, structure, batch)
        found: list[list[Score]] = [[] for _ in rows]
        for span in spans_of(rows):
            place = slice(span.start, span.end)
            found[span.row].append(
                Score(
                    kind=span.kind,
                    right=bool(hits[span.row, place].all()),
                    loss=float(losses[span.row, place].sum(dtype=torch.float64)),
                    num_tokens=span.end - span.start,
                )
            )
        yield from found


def _answer_tokens(
    forward: Callable[..., Any], model: PreTrainedModel, structure: LayerStructure, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss (float32) and whether it is the most likely one (bool) of each token that is part of an answer."""
    layout = layout_of(batch)
    columns = labelled_columns(batch["labels"])
    logits = forward(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=mask_argument(model, structure, layout),
        logits_to_keep=columns,
        use_cache=False,
    ).logits
    ids = batch["input_ids"]
    targets = ids[:, columns + 1]
    losses, hits = torch.zeros(ids.shape), torch.zeros(ids.shape, dtype=torch.bool)
    nll = functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    where = (columns + 1).cpu()
    losses[:, where] = nll.cpu()
    hits[:, where] = (logits.argmax(-1) == targets).cpu()
    return losses, hits
