"""The transformers Trainer, with the block mask, this package's loss, and an evaluation of both attentions.

Everything else is the Trainer's: optimizer, schedule, accumulation, mixed precision, several processes, checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback

from blockrag.errors import InputError
from blockrag.finetune.collate import Collator, layout_of
from blockrag.finetune.loss import Reduction, denominator, labelled_columns, summed_loss
from blockrag.finetune.scoring import Mode, Score, score
from blockrag.model.masks import mask_argument
from blockrag.model.profile import structure_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments

    from blockrag.finetune.rows import Rows
    from blockrag.finetune.samples import Sample

__all__ = ["BlockTrainer", "StopsOnNaN", "summarize"]


class StopsOnNaN(TrainerCallback):  # type: ignore[misc]
    """Ends a run whose loss is no number any more, before it saves what is lost."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        """Called by the Trainer behind every step: what will be saved is logged first, and looked at.

        A run that goes on from a checkpoint then also logs what it would have logged without the stop.
        """
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True
        return control

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the Trainer with every line of its log.

        Raises:
            InputError: The loss, the gradient's norm or the loss of an evaluation is not finite.
        """
        for name, value in kwargs["logs"].items():
            if not math.isfinite(value):
                raise InputError(
                    f"{name} is {value} at step {state.global_step}: the run has diverged; lower --learning-rate, "
                    "or compute in float32 or bfloat16"
                )


class BlockTrainer(Trainer):  # type: ignore[misc]
    """Trains under the block mask.

    Args:
        model: The model to train, adapters included.
        base: The model that knows its layers: `model`, or what its adapters are wrapped around.
        arguments: The Trainer's.
        rows: What to train on.
        collator: Rows to tensors.
        reduction: What the loss is divided by.
        tokenizer: Saved with every checkpoint.
        evaluated: What to score while training; may be empty.
        optimizer: The optimizer, instead of the one that `arguments` name.
        callbacks: The Trainer's.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        base: PreTrainedModel,
        arguments: TrainingArguments,
        rows: Rows,
        collator: Collator,
        *,
        reduction: Reduction,
        tokenizer: PreTrainedTokenizerBase,
        evaluated: Sequence[Sample] = (),
        optimizer: torch.optim.Optimizer | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=rows,
            # Scored by `evaluate`; the Trainer only asks whether there is something.
            eval_dataset=list(evaluated) or None,
            data_collator=collator,
            processing_class=tokenizer,
            optimizers=(optimizer, None),
            callbacks=list(callbacks),
        )
        # Of the Trainer: `compute_loss` divides by a number of the whole step, accumulation included.
        self.loss_is_scaled_for_ga = True
        self._base = base
        self._structure = structure_of(base)
        self._reduction: Reduction = reduction
        self._evaluated = evaluated
        self._pad_id = collator.pad_id

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, torch.Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor | None]:
        """The micro-batches of one optimizer step, and what their loss is divided by, over all processes."""
        if self.state.global_step >= self.state.max_steps:
            # Resumed from the checkpoint of the last step; the Trainer would only stop behind one step more.
            return [], None
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        tokens = torch.stack([(batch["prompt"] >= 0).sum(dtype=torch.float64) for batch in batches]).sum()
        counts = torch.stack([denominator(batches, self._reduction), tokens]).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        # In the state, so that a checkpoint keeps it; the Trainer's own count would need a padding mask.
        self.state.num_input_tokens_seen += int(counts[1])
        return batches, counts[0]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch: its part of the loss of the step."""
        batch = dict(inputs)
        layout = layout_of(batch)
        labels = batch["labels"]
        columns = labelled_columns(labels)
        outputs = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=mask_argument(self._base, self._structure, layout),
            logits_to_keep=columns,
            use_cache=False,
        )
        if num_items_in_batch is None:
            num_items_in_batch = denominator([inputs], self._reduction)
        # Processes average their gradients, where the loss of the step is their sum.
        loss = summed_loss(outputs.logits, labels, batch["weights"], columns)
        loss = loss * self.args.world_size / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def evaluate(
        self, eval_dataset: object = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score the evaluation samples in both attentions; see `summarize` for what is logged."""
        metrics: dict[str, float] = {}
        self.model.eval()
        modes: tuple[Mode, ...] = ("full", "block")
        for mode in modes:
            for name, value in summarize(self._scores(mode)).items():
                metrics[f"{metric_key_prefix}_{mode}_{name}"] = value
        self.model.train()
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _scores(self, mode: Mode) -> list[Score]:
        """The scores of all evaluation samples; processes share them, and run equally many forwards."""
        world, rank, count = self.args.world_size, self.args.process_index, len(self._evaluated)
        turns = -(-count // world)
        mine = [self._evaluated[min(turn * world + rank, count - 1)] for turn in range(turns)]
        found = score(
            self._base,
            self._structure,
            mine,
            mode,
            pad_id=self._pad_id,
            batch_rows=self.args.per_device_eval_batch_size,
            forward=self.model_wrapped,
        )
        own = [scores if turn * world + rank < count else [] for turn, scores in enumerate(found)]
        if world == 1:
            return [one for scores in own for one in scores]
        from accelerate.utils import gather_object

        # Turn by turn and process by process, which is the order of the samples.
        parts = gather_object([own])
        return [one for turn in zip(*parts, strict=True) for scores in turn for one in scores]


def summarize(scores: Sequence[Score]) -> dict[str, float]:
    """Exact match in percent, over all questions and by kind, and the loss per token of an answer in nats."""
    if not scores:
        return {}
    found = {
        "exact_match": 100 * sum(one.right for one in scores) / len(scores),
        "loss": sum(one.loss for one in scores) / sum(one.num_tokens for one in scores),
    }
    for kind in sorted({one.kind for one in scores} - {""}):
        of_kind = [one.right for one in scores if one.kind == kind]
        found[f"exact_match_{kind}"] = 100 * sum(of_kind) / len(of_kind)
    return found
