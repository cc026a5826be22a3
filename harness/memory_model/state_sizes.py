"""Compute the bytes of 4-bit weights and of optimizer states, by the formulas of the reference code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from harness.cell.training.optimizers import SIXTEEN_BIT
from harness.memory_model.ledger import OPTIMIZERS
from harness.methods.spec import Adapted
from reference import galore
from reference.operations import adamw8bit, double_quant, paged
from reference.shared import galore_moments

BLOCK = 64
"""Number of weights that share one quantisation constant in NF4, as in QLoRA and bitsandbytes."""
_STEP_B = 4
"""Bytes of the step count that torch's AdamW stores for each tensor."""


def packed_bytes(numel: int, base: str) -> int:
    """Return the number of bytes of a packed weight: its codes and its quantisation constants.

    base: `nf4` or `nf4-dq` (QLoRA, arXiv:2305.14314, section 3). The table of 16 levels is not counted, because all
    weights share it.
    """
    return round(double_quant.bits_per_parameter(numel, BLOCK, double=base == "nf4-dq") * numel / 8)


def adamw_bytes(numels: Iterable[int], name: str, dtype: torch.dtype) -> tuple[int, int]:
    """Return the size of an AdamW state in bytes, as a pair: device memory, host memory.

    numels: number of elements of each trainable tensor. name: name of the optimizer, e.g. `paged-adamw-8bit`.

    Sizes follow the optimizers of Cells (`harness.cell.training.optimizers`). 16-bit weights have float32 master
    copies. An 8-bit optimizer has moments in 8 bits (arXiv:2110.02861). Other moments are in float32, or in the
    weight's dtype if this is wider. A paged optimizer stores the moments of a tensor in host memory if the tensor has
    at least 100,000 elements (arXiv:2305.14314, section 3).
    """
    device = host = 0
    for n in numels:
        masters = 4 * n if dtype in SIXTEEN_BIT else 0
        moments = adamw8bit.state_bytes(n) if name.endswith("8bit") else 2 * n * max(4, dtype.itemsize)
        away = moments if name.startswith("paged") and paged.is_paged(n) else 0
        device += masters + moments - away + _STEP_B
        host += away
    return device, host


def optimizer_bytes(adapted: Adapted, trains: Sequence[nn.Parameter], dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """Map each optimizer that the Method supports to the bytes of its state, as a pair: on the device, in host memory.

    Raises TypeError if the Method has its own optimizer and the state of this optimizer is unknown.
    """
    optimizer = adapted.optimizer(1e-3, 0.0)
    if optimizer is None:
        return {name: adamw_bytes([p.numel() for p in trains], name, dtype) for name in OPTIMIZERS}
    if not isinstance(optimizer, galore.GaLore):
        raise TypeError(f"the states of {type(optimizer).__name__} are unknown")
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    masters = 4 * sum(p.numel() for p in trains) if has_masters(dtype, own=True) else 0
    itemsize = 4 if masters else dtype.itemsize
    return {
        name: (masters + sum(_galore(p, groups.get(id(p), optimizer.defaults), itemsize, bits) for p in trains), 0)
        for name, bits in zip(galore.SPEC.optimizers, (32, 8), strict=True)
    }


def _galore(p: nn.Parameter, group: dict[str, Any], itemsize: int, bits: int) -> int:
    """Return the bytes of a parameter's state in GaLore.

    A projected parameter has a projector and small moments. Any other parameter has Adam's two moments.
    """
    if not group["rank"]:
        return galore_moments.stored_bytes(p.numel(), itemsize, bits)
    m, n = p.shape
    r: int = min(group["rank"], m, n)
    left, right = galore.sides(m, n, group["side"])
    moments = (r if left else m) * (r if right else n)
    return r * (m * left + n * right) * itemsize + galore_moments.stored_bytes(moments, itemsize, bits)


def has_masters(dtype: torch.dtype, *, own: bool) -> bool:
    """Return whether weights of this dtype have float32 master copies.

    own: whether the Method has its own optimizer. Such an optimizer updates bfloat16 weights without master copies.
    """
    return dtype == torch.float16 if own else dtype in SIXTEEN_BIT


def bytes_in_step(trains: Sequence[nn.Parameter], dtype: torch.dtype, *, own: bool) -> int:
    """Return the bytes that exist only while an optimizer steps: the float32 gradients of float32 master copies.

    They are 0 if weights of this dtype have no master copies. own: whether the Method has its own optimizer.
    """
    return 4 * sum(p.numel() for p in trains) if has_masters(dtype, own=own) else 0
