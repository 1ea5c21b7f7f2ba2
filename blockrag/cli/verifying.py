"""`blockrag verify`: what the probes found out about a model, or why it is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from blockrag.cli.directory import model_name
from blockrag.cli.options import AsJson, Device, Dtype
from blockrag.cli.output import PARTLY_FAILED, Output, clean, quiet_transformers, reporting
from blockrag.errors import UnsupportedModelError

if TYPE_CHECKING:
    from blockrag.model.block_model import BlockModel
    from blockrag.model.facts import BlockAttentionFacts
    from blockrag.model.profile import ModelProfile, Regime
    from blockrag.rope import RopeSpec

__all__ = ["verify"]

_ATTENTION = {
    "blockrag_folded": "grouped queries folded, keys not repeated",
    "sdpa": "transformers' own",
    "eager": "the model's own code, the slowest",
}


def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="'demo', a hub id or a directory.")],
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Probe whether a model can be used.

    Can prompts be composed from its stored blocks, how exactly, and up to what length?

    The shift probe finds, per layer, the rotation that moves keys and values to other positions. The equivalence
    probe compares a composed prompt with one forward under the block mask. Exit code 1 if the model is refused.
    """
    with reporting(as_json) as out:
        name = model_name(model)
        try:
            with out.working(f"probing {name} ..."):
                from blockrag.model.block_model import BlockModel

                quiet_transformers()
                probed = BlockModel.from_pretrained(name, device=device, dtype=dtype)
        except UnsupportedModelError as error:
            out.exit_code = PARTLY_FAILED
            out.show(f"{name} is refused")
            out.error(str(error))
            out.result({"model": name, "supported": False, "reason": str(error)})
            return
        profile = probed.profile
        if profile is None:
            raise AssertionError("a model that attends to blocks has a profile")
        _show(out, probed, profile)
        out.result(_as_json(name, probed, profile))


def _show(out: Output, probed: BlockModel, profile: ModelProfile) -> None:
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for label, value in _facts(probed, profile).items():
        facts.add_row(Text(label, style="dim"), Text(clean(value)))
    out.show(Text(f"{clean(probed.name)}: prompts can be composed from stored blocks", style="bold"), "", facts)
    for regime in profile.regimes:
        out.show("")
        if len(profile.regimes) > 1:
            out.show(f"{regime.name} regime")
        out.show(_layer_table(profile, regime))


def _facts(probed: BlockModel, profile: ModelProfile) -> dict[str, str]:
    config, weights = probed.model.config, sum(p.numel() for p in probed.model.parameters())
    relative = profile.equivalence_error / profile.logit_scale
    limits = "not known" if profile.max_tokens is None else f"{profile.max_tokens:,} tokens, prompt and answer together"
    if profile.regime_limit is not None:
        limits += f"; short position factors up to {profile.regime_limit:,}, long ones beyond"
    return {
        "model": f"{type(probed.model).__name__} ({config.model_type}), {weights:,} parameters",
        "computes in": f"{_dtype(probed)} on {probed.model.device}",
        "attention": f"{profile.attention} ({_ATTENTION.get(profile.attention, 'chosen by transformers')})",
        "shift probe": f"keys and values move with relative error {profile.shift_error:.1e}",
        "equivalence": f"logits differ by {profile.equivalence_error:.1e} on a scale of {profile.logit_scale:.1f} "
        f"({relative:.0e})",
        "limit": limits,
        "at rest": f"{_token_bytes(probed, profile):,} bytes per token in {probed.precision}",
        "template": probed.template.name,
        "block prefix": repr(probed.template.block_attention_prefix)
        if probed.template.block_attention_prefix
        else "none",
        "block-fine-tuned": _fine_tuned(probed.facts),
    }


def _fine_tuned(facts: BlockAttentionFacts) -> str:
    """Whether the model was, and what it has seen."""
    known = {True: "yes", False: "no", None: "not known"}[facts.block_fine_tuned]
    seen = [
        f"{count:,} {what}"
        for count, what in ((facts.max_blocks, "blocks"), (facts.max_tokens, "positions"))
        if count is not None
    ]
    return f"{known}, on up to {' and '.join(seen)}" if seen else known


def _layer_table(profile: ModelProfile, regime: Regime) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("layers", no_wrap=True)
    table.add_column("keys turn", no_wrap=True)
    table.add_column("values turn", no_wrap=True)
    table.add_column("slowest turn", justify="right", no_wrap=True)
    table.add_column("window", justify="right", no_wrap=True)
    rows = [(index, *row) for index, *row in _layers(profile, regime)]
    for cells, group in groupby(rows, key=lambda row: row[1:]):
        indices = [str(row[0]) for row in group]
        span = indices[0] if len(indices) == 1 else f"{indices[0]}-{indices[-1]}"
        keys, values, window = cells
        turned = [_slowest_turn(spec) for spec in (keys, values) if spec.kind != "none"]
        period = f"{turned[0]:,.0f} tokens" if turned else "-"
        table.add_row(span, _describe(keys), _describe(values), period, "none" if window is None else f"{window:,}")
    return table


def _layers(profile: ModelProfile, regime: Regime) -> Iterator[tuple[int, RopeSpec, RopeSpec, int | None]]:
    """Layer, what turns its keys and its values, and its window."""
    structure = profile.structure
    for index, ropes, window in zip(structure.indices, regime.ropes, structure.windows, strict=True):
        yield index, ropes.keys, ropes.values, window


def _describe(spec: RopeSpec) -> str:
    backwards = spec.kind != "none" and spec.frequencies[0] < 0
    return spec.describe() + (" backwards" if backwards else "")


def _slowest_turn(spec: RopeSpec) -> float:
    """Tokens in which the slowest pair of dimensions turns once."""
    moving = [abs(frequency) for frequency in spec.frequencies if frequency]
    return 2 * math.pi / min(moving) if moving else 0.0


def _dtype(probed: BlockModel) -> str:
    return str(probed.model.dtype).removeprefix("torch.")


def _token_bytes(probed: BlockModel, profile: ModelProfile) -> int:
    from blockrag.codec import payload_nbytes

    # Scales are kept once per block: what a token takes depends a little on how long the block is.
    return round(payload_nbytes(profile.layout, 256, probed.precision) / 256)


def _as_json(name: str, probed: BlockModel, profile: ModelProfile) -> dict[str, object]:
    regimes = [
        {
            "name": regime.name,
            "layers": [
                {
                    "layer": index,
                    "keys": _describe(keys),
                    "values": _describe(values),
                    "slowest_turn_tokens": max(map(_slowest_turn, (keys, values))) or None,
                    "window": window,
                }
                for index, keys, values, window in _layers(profile, regime)
            ],
        }
        for regime in profile.regimes
    ]
    return {
        "model": name,
        "supported": True,
        "class": type(probed.model).__name__,
        "model_type": probed.model.config.model_type,
        "parameters": sum(p.numel() for p in probed.model.parameters()),
        "dtype": _dtype(probed),
        "device": str(probed.model.device),
        "attention_function": profile.attention,
        "shift_error": profile.shift_error,
        "equivalence_error": profile.equivalence_error,
        "logit_scale": profile.logit_scale,
        "regimes": regimes,
        "regime_limit": profile.regime_limit,
        "max_tokens": profile.max_tokens,
        "precision": probed.precision,
        "bytes_per_token": _token_bytes(probed, profile),
        "template": probed.template.name,
        "block_prefix": probed.template.block_attention_prefix,
        "block_fine_tuned": probed.facts.block_fine_tuned,
        "max_trained_blocks": probed.facts.max_blocks,
        "max_trained_tokens": probed.facts.max_tokens,
    }
