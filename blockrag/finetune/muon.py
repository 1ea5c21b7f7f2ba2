"""Muon for the matrices of a model's layers and AdamW for the rest, as one optimizer.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) orthogonalizes each update; torch has it for
matrices alone. Embeddings, the output projection, norms and biases go to AdamW, as its authors advise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from blockrag.errors import InputError, MissingDependencyError
from blockrag.finetune.placing import is_shared_out

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from blockrag.finetune.settings import FinetuneSettings

__all__ = ["MuonWithAdamW", "muon_of"]


def muon_of(model: nn.Module, arguments: TrainingArguments, settings: FinetuneSettings) -> torch.optim.Optimizer:
    """Muon, where every process has whole matrices.

    Raises:
        InputError: The weights are shared out over processes.
        MissingDependencyError: This torch has no Muon.
    """
    if not hasattr(torch.optim, "Muon"):
        raise MissingDependencyError(f"torch {torch.__version__} has no Muon; run: pip install 'torch>=2.9'")
    if is_shared_out(arguments):
        raise InputError("optimizer='muon' needs whole matrices, and FSDP or DeepSpeed cuts them; use 'adamw' there")
    return MuonWithAdamW(model, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay)


class MuonWithAdamW(torch.optim.Optimizer):
    """Both optimizers behind one interface.

    Muon's updates are scaled to the size of AdamW's, so that one learning rate serves both.

    Args:
        model: Its trainable parameters are optimized; the matrices of its embeddings are told by their modules.
        lr: Learning rate of both.
        betas: AdamW's.
        weight_decay: Of both, except for parameters with one dimension.
    """

    def __init__(self, model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        output = getattr(model, "get_output_embeddings", lambda: None)()
        if output is not None:
            embeddings.add(id(output.weight))
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        matrices = [weight for weight in trained if weight.ndim == 2 and id(weight) not in embeddings]
        taken = set(map(id, matrices))
        others = [weight for weight in trained if id(weight) not in taken]
        adamw = [
            {"params": [weight for weight in others if weight.ndim > 1], "weight_decay": weight_decay},
            {"params": [weight for weight in others if weight.ndim <= 1], "weight_decay": 0.0},
        ]
        self._parts: list[torch.optim.Optimizer] = []
        # Adapters are matrices alone.
        if matrices:
            muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self._parts.append(muon)
        if others:
            groups = [group for group in adamw if group["params"]]
            self._parts.append(torch.optim.AdamW(groups, lr=lr, betas=betas))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share_groups()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the states of both."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._share_groups()

    def _share_groups(self) -> None:
        """A schedule changes the learning rates it finds here; they must be those that the parts use."""
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for part in self._parts:
            part.zero_grad(set_to_none)
