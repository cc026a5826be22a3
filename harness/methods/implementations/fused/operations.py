"""Operations of `fused`: the functions of `harness/kernels/torch`, imported on their first call."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.methods.registry import DTYPES, Implementation, implements

if TYPE_CHECKING:
    from torch import Tensor
_ALONE = (
    "adalora_importance", "adamw8bit_step", "dora_linear", "dynamic_quantize", "galore_step", "lora_experts", "lora_linear",
    "lora_mlp", "lora_qkv", "multi_lora_linear", "nf4_linear", "nf4_lora_linear", "vera_linear",
)  # fmt: skip
"""Operations whose module and function have the Operation's name, e.g. `lora_linear.lora_linear`."""
_FUNCTIONS = {name: f"{name}.{name}" for name in _ALONE} | {
    "galore8bit_step": "galore_step.galore8bit_step",
    "nf4_quantize": "nf4.quantize",
    "nf4_dequantize": "nf4.dequantize",
    "double_quantize": "nf4.double_quantize",
    "double_dequantize": "nf4.double_dequantize",
}
"""Module and function in `harness/kernels/torch` for each Operation, as `module.function`."""
_OPERATION: dict[str, Any] = {"name": "fused", "kind": "operation", "dtypes": DTYPES}


def implementations() -> list[Implementation]:
    """Return one Implementation per Operation."""
    return [*(_operation(*item) for item in _FUNCTIONS.items()), paged_adamw, paged_states]


def _operation(name: str, path: str) -> Implementation:
    module, _, function = path.partition(".")

    @implements(name, **_OPERATION)
    def call(**arguments: Any) -> Any:
        return getattr(importlib.import_module(f"harness.kernels.torch.{module}"), function)(**arguments)

    return call


@implements("paged_adamw", **_OPERATION)
def paged_adamw(params: Sequence[Tensor], grads: Sequence[Sequence[Tensor]], **options: Any) -> tuple[Tensor, ...]:
    """Take one step of torch's AdamW for each list in `grads`. Return the new parameters.

    Between steps, optimizer states with 100,000 elements or more are in host memory. options: those of torch's AdamW.
    """
    return tuple(p.detach() for p in _paged_steps(params, grads, **options)[1])


@implements("paged_states", **_OPERATION)
def paged_states(params: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """Return a float tensor with one number per parameter: 1 if the parameter's states are paged, else 0."""
    import torch

    optimizer, trained = _paged_steps(params, [grads])
    return torch.tensor([float(p in optimizer.where()) for p in trained], dtype=torch.float32, device=trained[0].device)


def _paged_steps(params: Sequence[Tensor], grads: Sequence[Sequence[Tensor]], **options: Any) -> tuple[Any, list[Any]]:
    import torch

    from harness.kernels.torch.optimizers.paged import Paged

    trained = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = Paged(torch.optim.AdamW(trained, **options), budget=0)
    for step_grads in grads:
        for p, g in zip(trained, step_grads, strict=True):
            p.grad = g
        optimizer.step()
    return optimizer, trained
