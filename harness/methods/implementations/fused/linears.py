"""Operations of the layers of LoRA, DoRA and VeRA, and of AdaLoRA's importance."""

from __future__ import annotations

import importlib
from typing import Any

from harness.methods.registry import Implementation, implements

DTYPES = ("float64", "float32", "bfloat16", "float16")


def _operation(name: str) -> Implementation:
    @implements(name, name="fused", dtypes=DTYPES)
    def call(**arguments: Any) -> Any:
        return getattr(importlib.import_module(f"harness.kernels.torch.{name}"), name)(**arguments)

    return call


lora_linear, dora_linear, vera_linear = map(_operation, ("lora_linear", "dora_linear", "vera_linear"))
adalora_importance = _operation("adalora_importance")
