"""Several LoRA adapters in one batch."""

from __future__ import annotations

from typing import Any

from harness.methods.registry import DTYPES, implements


@implements("multi_lora_linear", name="fused", kind="operation", dtypes=DTYPES)
def multi_lora_linear(x: Any, W: Any, As: Any, Bs: Any, scalings: Any, ids: Any) -> Any:
    """Return the linear layer's output with each sequence's own update."""
    from harness.kernels.torch.multi_lora_linear import multi_lora_linear

    return multi_lora_linear(x, W, As, Bs, scalings, ids)
