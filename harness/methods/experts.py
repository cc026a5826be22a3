"""Expert weights that are stacked in one parameter, in mixture-of-experts models. Imports no torch.

Such a parameter belongs to no linear layer. So the target `all-linear` does not adapt it, and a 4-bit quantisation of
the base does not pack it. The target `experts` of LoRA and QLoRA adapts it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.methods.peft_config import KEY

if TYPE_CHECKING:
    from torch import nn

    from harness.records.record import Cell

ALL_LINEAR = "all-linear"
_ADAPTED = {"base", "base_layer"}
"""Attributes in which an adapted layer keeps the original experts: `base` in our code, `base_layer` in HF peft."""


def untouched(model: nn.Module) -> int:
    """Return the number of expert weights that do not train and have no adapter.

    `model` must be ready to train, so that `requires_grad` is final. Experts are modules with `Expert` in their class
    name, as in transformers. The parameters of such a module are the stacked matrices of all experts in a block.
    """
    return sum(
        p.numel()
        for path, module in model.named_modules()
        if "Expert" in type(module).__name__ and not _ADAPTED & {*path.split(".")}
        for p in module.parameters(recurse=False)
        if p.dim() > 1 and not p.requires_grad
    )


def takes_all_linear_layers(cell: Cell) -> bool:
    """Return whether a Cell adapts all linear layers. Without a list of targets, return whether it quantises them all."""
    if isinstance(keys := cell.config.get(KEY), dict):
        return keys.get("target_modules") == ALL_LINEAR
    targets = cell.config.get("targets")
    return ALL_LINEAR in targets if isinstance(targets, list) else cell.base.quantization != "none"


def note(number: int, weights: int, words: str = "`targets: [all-linear, experts]`") -> str:
    """Return a sentence that says how many expert weights are neither adapted nor packed.

    number: number of these expert weights; if it is 0, return an empty string. weights: number of all weights.
    words: keys or options that select the experts.
    """
    if not number:
        return ""
    return (
        f"the experts are stacked weights and no linear layers: {number:,} of {weights:,} weights "
        f"({number / weights:.0%}) are neither adapted nor packed into 4 bits; "
        f"LoRA and QLoRA adapt them by {words}"
    )


def notes(cell: Cell, model: nn.Module, weights: int) -> list[str]:
    """Return notes for a Record about expert weights that do not train and have no adapter. `model` must be ready to train.

    The list is empty unless the Cell adapts or quantises all linear layers. weights: number of the model's weights
    without its adapter.
    """
    return [text] if takes_all_linear_layers(cell) and (text := note(untouched(model), weights)) else []
