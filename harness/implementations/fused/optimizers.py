"""The optimizers' Operations: 8-bit AdamW, its blocks of codes, and AdamW whose states are paged."""

from __future__ import annotations

from typing import Any

from harness.registry import DTYPES, implements

_HOW: dict[str, Any] = {"name": "fused", "kind": "operation", "dtypes": DTYPES}


@implements("dynamic_quantize", **_HOW)
def dynamic_quantize(x: Any, block: int, signed: bool) -> tuple[Any, Any]:
    """Return uint8 codes and the float32 absmax of each block."""
    from harness.kernels.dynamic_quantize import dynamic_quantize

    return dynamic_quantize(x, block, signed)


@implements("adamw8bit_step", **_HOW)
def adamw8bit_step(p: Any, g: Any, **others: Any) -> tuple[Any, ...]:
    """Take one step from the state given. others: m, m_absmax, v, v_absmax, step and the optimizer's knobs."""
    from harness.kernels.adamw8bit import adamw8bit_step

    return adamw8bit_step(p, g, **others)
