"""The bytes of 4-bit weights and of optimizer states, by the references' own counts of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from harness.footprint.choices import OPTIMIZERS, OWN
from harness.training.master import HALVES
from reference import adamw8bit, double_quant, galore, paged

BLOCK = 64
"""Weights that share a constant in NF4: QLoRA's and bitsandbytes' size."""
_STEP_B = 4
"""torch's AdamW counts the steps of each tensor in a float32."""


def packed(numel: int, base: str) -> int:
    """Return the bytes of a weight in `nf4` or `nf4-dq`: codes and constants (QLoRA, arXiv:2305.14314, section 3).

    The table of 16 levels is the type's own and not counted.
    """
    return round(double_quant.bits_per_parameter(numel, BLOCK, double=base == "nf4-dq") * numel / 8)


def adamw(numels: Iterable[int], name: str, dtype: torch.dtype) -> tuple[int, int]:
    """Return the bytes of an optimizer's state (on the device, in host memory) for tensors of so many numbers each.

    As Cells have it, see `harness.training.optimizers`: for weights of 16 bits with masters in float32; moments in float32
    or in 8 bits (arXiv:2110.02861). A paged one keeps the moments of tensors of at least 100,000 numbers in host memory
    (arXiv:2305.14314, section 3).
    """
    device = host = 0
    for n in numels:
        masters = 4 * n if dtype in HALVES else 0
        moments = adamw8bit.state_bytes(n) if name.endswith("8bit") else 2 * n * max(4, dtype.itemsize)
        away = moments if name.startswith("paged") and paged.is_paged(n) else 0
        device += masters + moments - away + _STEP_B
        host += away
    return device, host


def optimizers(adapted: Any, trains: Sequence[nn.Parameter], dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """Map each optimizer that may train this to its bytes; a Method's own is the only one it may have.

    Raises TypeError for an optimizer of a Method's own of which nothing is known.
    """
    optimizer = adapted.optimizer(1e-3, 0.0)
    if optimizer is None:
        return {name: adamw([p.numel() for p in trains], name, dtype) for name in OPTIMIZERS}
    if not isinstance(optimizer, galore.GaLore):
        raise TypeError(f"nothing is known of the states of {type(optimizer).__name__}")
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    numbers = sum(_galore(p, groups.get(id(p), optimizer.defaults)) for p in trains)
    if dtype == torch.float16:  # with masters; bfloat16 is stepped as it is
        return {OWN: (4 * (numbers + sum(p.numel() for p in trains)), 0)}
    return {OWN: (numbers * dtype.itemsize, 0)}


def _galore(p: nn.Parameter, group: dict[str, Any]) -> int:
    """Count the numbers that GaLore keeps for a parameter: a projector and small moments, or Adam's two."""
    if not group["rank"]:
        return 2 * p.numel()
    m, n = p.shape
    return galore.state_elements(m, n, group["rank"], group["side"])


def in_step(name: str, trains: Sequence[nn.Parameter], dtype: torch.dtype) -> int:
    """Return the bytes that exist only while an optimizer steps: float32 gradients of its masters."""
    masters = dtype == torch.float16 if name == OWN else dtype in HALVES
    return 4 * sum(p.numel() for p in trains) if masters else 0
