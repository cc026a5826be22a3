"""Experts, whose weights are in no linear layer: neither `all-linear` nor a base in 4 bits reaches them. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.methods.peft_config import KEY

if TYPE_CHECKING:
    from harness.records.record import Cell

ALL_LINEAR = "all-linear"
UNREACHED = "are neither adapted nor packed into 4 bits"


def untouched(model: Any) -> int:
    """Return how many weights of experts neither train nor have an adapter of HF peft's around them.

    Experts are modules with `Expert` in the name of their class, as the classes of transformers are called, that hold the
    matrices of a whole block themselves. Ask it of a model as it trains.
    """
    return sum(
        p.numel()
        for path, module in model.named_modules()
        if "Expert" in type(module).__name__ and "base_layer" not in path
        for p in module.parameters(recurse=False)
        if p.dim() > 1 and not p.requires_grad
    )


def means_all(cell: Cell) -> bool:
    """Say whether a Cell names no layers: it adapts all that are linear, or packs them."""
    if isinstance(keys := cell.config.get(KEY), dict):
        return keys.get("target_modules") == ALL_LINEAR
    targets = cell.config.get("targets")
    return ALL_LINEAR in targets if isinstance(targets, list) else cell.base.quantization != "none"


def told(number: int, weights: int) -> str:
    """Return the sentence about so many of a model's weights; none where there are none."""
    if not number:
        return ""
    return (
        f"the experts are stacked weights and no linear layers: {number:,} of {weights:,} weights "
        f"({number / weights:.0%}) {UNREACHED}; `method: peft` adapts them by `target_parameters`"
    )


def notes(cell: Cell, model: Any, weights: int) -> list[str]:
    """Return what a Record says of this, about a model as it trains. weights: of the model without its adapter."""
    said = told(untouched(model), weights) if means_all(cell) else ""
    return [said] if said else []
