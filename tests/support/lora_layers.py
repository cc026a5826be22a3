"""LoRA on one layer of each kind: the layers, their inputs, and a forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harness.conformance.subject import DTYPES, configure, warm
from reference import lora
from support.two_layer_model import generator

R, ALPHA = 4, 6.0
GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": (2, 1), "padding": 1},
    "dilation": {"dilation": (2, 1), "padding": (2, 0)},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": (1, 2), "padding_mode": "circular", "dilation": 2},
    "same": {"padding": "same", "padding_mode": "replicate"},
    "groups": {"groups": 2, "padding": 1, "bias": False},
    "everything": {"groups": 2, "stride": 2, "padding": 2, "dilation": 2, "padding_mode": "reflect"},
}


class Scaled(nn.Embedding):
    """Embedding whose output is multiplied by a number, as in Gemma."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("embed_scale", torch.tensor(3.0))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


MADE: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(12, 10),
    "Conv1D": lambda: Conv1D(10, 12),
    "embedding": lambda: nn.Embedding(20, 10, padding_idx=3),
    "scaled": lambda: Scaled(20, 10),
} | {name: lambda g=g: nn.Conv2d(6, 8, 3, **g) for name, g in GEOMETRIES.items()}
# A convolution in another dtype than float64 takes 0.1 s. So only the hardest geometry is tested in all dtypes.
COSTLY = set(GEOMETRIES) - {"everything"}
CASES = [(n, d) for n in MADE for d in DTYPES if n not in COSTLY or d == "float64"]


def model(name: str, dtype: str = "float64") -> nn.Module:
    torch.manual_seed(3)
    made = nn.Sequential()
    made.add_module("layer", MADE[name]())
    return made.double().to(DTYPES[dtype])


def sample(name: str, dtype: str = "float64") -> Tensor:
    if name in ("embedding", "scaled"):
        return torch.randint(0, 20, (3, 5), generator=generator(1))
    shape = (3, 5, 12) if name in ("linear", "Conv1D") else (2, 6, 9, 8)
    return torch.randn(shape, generator=generator(1), dtype=torch.float64).to(DTYPES[dtype])


def config(**keys: Any) -> Any:
    return configure("lora", {"rank": R, "alpha": ALPHA, "targets": ["layer"], **keys})


def attached(name: str, dtype: str = "float64", attach: Callable[..., Any] = lora.attach, **keys: Any) -> Any:
    return attach(model(name, dtype), config(**keys), generator(5))


def warmed(name: str, dtype: str = "float64", attach: Callable[..., Any] = lora.attach, **keys: Any) -> Any:
    adapted = attached(name, dtype, attach, **keys)
    warm(adapted.tensors(), generator(6))
    return adapted


def run(adapted: Any, x: Tensor) -> dict[str, Tensor]:
    """Return the output `y`, and the gradients of the input `x` and of all trained tensors, for a fixed gradient of `y`."""
    leaf = x.clone().requires_grad_(x.is_floating_point())
    y = adapted.model(leaf)
    dy = torch.randn(y.shape, generator=generator(2), dtype=torch.float64).to(y.dtype)
    named = adapted.tensors() | ({"x": leaf} if leaf.requires_grad else {})
    return {"y": y.detach()} | dict(zip(named, torch.autograd.grad(y, list(named.values()), dy), strict=True))
