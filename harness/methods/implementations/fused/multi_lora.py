"""Several LoRA adapters in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from harness.methods.registry import DTYPES, implements

if TYPE_CHECKING:
    from torch import Tensor


@implements("multi_lora_linear", name="fused", kind="operation", dtypes=DTYPES)
def multi_lora_linear(
    x: Tensor, W: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor], scalings: Sequence[float], ids: Tensor
) -> Tensor:
    """Return a linear layer's output with each sequence's own update."""
    from harness.kernels.torch.multi_lora_linear import multi_lora_linear

    return multi_lora_linear(x, W, As, Bs, scalings, ids)
