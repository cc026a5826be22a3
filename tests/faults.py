"""Implementations with one mistake each, a few lines around the right one. `EXPECTED` says which checks must notice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from harness.implementations import bitsandbytes
from harness.registry import Implementation, implements
from reference import lora
from reference.layers import replace

LAYER_FAULTS: dict[str, type[lora.LoraLinear]] = {}
FAULTS: dict[str, Implementation] = {}
BASE_FAULTS: dict[str, Callable[..., Any]] = {}
EXPECTED: dict[str, set[str]] = {}


def _layer(*checks: str) -> Callable[[type[lora.LoraLinear]], type[lora.LoraLinear]]:
    """Plant a layer class: the reference's attach, with this class in every place."""

    def plant(kind: type[lora.LoraLinear]) -> type[lora.LoraLinear]:
        def attach(model: nn.Module, config: Any, generator: torch.Generator) -> Any:
            adapted = lora.attach(model, config, generator)
            for path, layer in adapted.layers.items():
                layer.__class__ = kind
                layer.calls = 0
                replace(model, path, layer)
            return adapted

        _add(kind.__name__, attach, checks)
        return kind

    return plant


def _attach(*checks: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def plant(function: Callable[..., Any]) -> Callable[..., Any]:
        _add(function.__name__, function, checks)
        return function

    return plant


def _add(name: str, attach: Callable[..., Any], checks: tuple[str, ...]) -> None:
    FAULTS[name] = implements("lora", name=name, dtypes=["float32"])(attach)
    EXPECTED[name] = set(checks)


def _base(*checks: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def plant(function: Callable[..., Any]) -> Callable[..., Any]:
        BASE_FAULTS[function.__name__] = function
        EXPECTED[function.__name__] = set(checks)
        return function

    return plant


@_layer("forward", "gradient")
class ReturnsZeros(lora.LoraLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0


@_layer("forward", "gradient", "merge")
class ForgetsTheScaling(lora.LoraLinear):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.A.T @ self.B.T


@_layer("forward", "gradient")
class DividesByTheRootOfTheRank(lora.LoraLinear):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * len(self.A) ** 0.5 * (x @ self.A.T @ self.B.T)


@_layer("forward", "gradient")
class SwapsAAndB(lora.LoraLinear):
    """Can only run where the layer is square."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * (x @ self.B @ self.A)


@_layer("gradient", "step")
class DetachesA(lora.LoraLinear):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * (x @ self.A.detach().T @ self.B.T)


@_layer("gradient")
class LosesTheInputsGradient(lora.LoraLinear):
    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * (x.detach() @ self.A.T @ self.B.T)


@_layer("gradient")
class DetachesItsOutput(lora.LoraLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


@_layer("forward", "deterministic")
class DropsInEval(lora.LoraLinear):
    def forward(self, x: Tensor) -> Tensor:
        dropped = nn.functional.dropout(x, 0.1, training=True)
        return self.base(x) + self.scaling * (dropped @ self.A.T @ self.B.T)


@_layer("inputs")
class WritesIntoItsInput(lora.LoraLinear):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        x.data.mul_(2)
        return out


@_layer("inputs")
class WritesIntoTheBase(lora.LoraLinear):
    def forward(self, x: Tensor) -> Tensor:
        self.base.weight.data[0, 0] += 1e-3
        return super().forward(x)


@_layer("forward", "gradient")
class ReturnsTheLastCallsOutput(lora.LoraLinear):
    def forward(self, x: Tensor) -> Tensor:
        last, self.last = getattr(self, "last", None), super().forward(x)
        return self.last if last is None else last.detach()


@_layer("forward", "gradient")
class ComputesInBfloat16(lora.LoraLinear):
    def forward(self, x: Tensor) -> Tensor:
        h = x.bfloat16() @ self.A.bfloat16().T
        return self.base(x) + self.scaling * (h @ self.B.bfloat16().T).to(x.dtype)


@_layer("deterministic")
class AddsNoise(lora.LoraLinear):
    def forward(self, x: Tensor) -> Tensor:
        # Far below any tolerance: only equality notices.
        return super().forward(x) * (1 + torch.finfo(x.dtype).eps * (torch.rand_like(x[..., :1]) < 0.5))


@_layer("identity")
class RoundsTheBase(lora.LoraLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 3) / 3 if self.base.bias is None else super().forward(x) * 3 / 3


@_layer("forward")
class IsWrongInTheLastRow(lora.LoraLinear):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return torch.cat([out[:-1], self.base(x[-1:])])


@_layer("model")
class TrainsOnlyBehindAnother(lora.LoraLinear):
    """Takes an input that needs no gradient, as the first layer of a model gets it, for inference."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(x.requires_grad):
            return super().forward(x)


@_attach("layers")
def trains_the_base_too(model: nn.Module, config: Any, generator: torch.Generator) -> Any:
    adapted = lora.attach(model, config, generator)
    for layer in adapted.layers.values():
        layer.base.weight.requires_grad_(True)
    return adapted


@_attach("layers")
def adapts_one_layer_too_few(model: nn.Module, config: Any, generator: torch.Generator) -> Any:
    adapted = lora.attach(model, config, generator)
    path = list(adapted.layers)[-1]
    replace(model, path, adapted.layers.pop(path).base)
    return adapted


@_attach("layers")
def adapts_the_wrong_layer(model: nn.Module, config: Any, generator: torch.Generator) -> Any:
    names = [
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.rsplit(".", 1)[-1] not in config.targets
    ]
    return lora.attach(model, dataclasses.replace(config, targets=tuple(names)), generator)


@_attach("layers")
def says_it_adapts_and_does_not(model: nn.Module, config: Any, generator: torch.Generator) -> Any:
    adapted = lora.attach(model, config, generator)
    for path, layer in adapted.layers.items():
        replace(model, path, layer.base)
    return adapted


@_attach("merge")
def merges_twice(model: nn.Module, config: Any, generator: torch.Generator) -> Any:
    adapted = lora.attach(model, config, generator)
    merge = adapted.merge

    def twice() -> None:
        merge()
        for path, layer in adapted.layers.items():
            model.get_submodule(path).weight.data += layer.delta().detach()

    adapted.merge = twice  # type: ignore[method-assign]
    return adapted


@_attach("merge")
def forgets_to_unmerge(model: nn.Module, config: Any, generator: torch.Generator) -> Any:
    adapted = lora.attach(model, config, generator)

    def merge() -> None:
        for layer in adapted.layers.values():
            layer.base.weight.data += layer.delta().detach()
            layer.merged = True

    for layer in adapted.layers.values():
        layer.register_forward_hook(lambda m, args, out: m.base(args[0]) if getattr(m, "merged", False) else out)

    def unmerge() -> None:
        for layer in adapted.layers.values():
            layer.merged = False  # and W0 keeps the update, which is now added twice

    adapted.merge, adapted.unmerge = merge, unmerge  # type: ignore[method-assign]
    return adapted


@_attach("merge")
def merges_the_transpose(model: nn.Module, config: Any, generator: torch.Generator) -> Any:
    adapted = lora.attach(model, config, generator)
    for layer in adapted.layers.values():
        layer.delta = lambda layer=layer: layer.scaling * (layer.B @ layer.A).T  # square layers only
    return adapted


@_attach("initial")
def starts_with_both_zero(model: nn.Module, config: Any, generator: torch.Generator) -> Any:
    adapted = lora.attach(model, config, generator)
    for layer in adapted.layers.values():
        layer.A.data.zero_()
    return adapted


@_attach("initial")
def starts_with_a_too_wide(model: nn.Module, config: Any, generator: torch.Generator) -> Any:
    adapted = lora.attach(model, config, generator)
    for layer in adapted.layers.values():
        layer.A.data.mul_(6**0.5)  # Kaiming with the gain that VeRA uses
    return adapted


@_attach("initial", "identity")
def starts_with_b_not_zero(model: nn.Module, config: Any, generator: torch.Generator) -> Any:
    adapted = lora.attach(model, config, generator)
    for layer in adapted.layers.values():
        layer.B.data.fill_(0.01)
    return adapted


@_attach("parameters")
def has_one_rank_too_many(model: nn.Module, config: Any, generator: torch.Generator) -> Any:
    adapted = lora.attach(model, dataclasses.replace(config, rank=config.rank + 1), generator)
    for layer in adapted.layers.values():
        layer.scaling = config.alpha / config.rank
    return adapted


@_attach("parameters", "step")
def forgets_to_name_b(model: nn.Module, config: Any, generator: torch.Generator) -> Any:
    adapted = lora.attach(model, config, generator)
    named = adapted.tensors
    adapted.tensors = lambda: {n: t for n, t in named().items() if n.endswith(".A")}  # type: ignore[method-assign]
    return adapted


def _repacked(model: Any, paths: list[str], dtype: Any, change: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Pack as bitsandbytes does, then change the bytes; `change` gets (bytes, original weight)."""
    weights = {path: model.get_submodule(path).weight.detach().clone() for path in paths}
    forms = bitsandbytes.nf4(model, paths, dtype)
    for path, (data, absmax, block) in forms.items():
        data.copy_(change(data, weights[path]))
        forms[path] = (data, absmax, block)
    return forms


@_base("codes")
def swaps_the_nibbles(model: Any, paths: list[str], dtype: Any) -> Any:
    return _repacked(model, paths, dtype, lambda data, _: (data >> 4) | (data << 4))


@_base("codes")
def takes_the_upper_code_at_a_tie(model: Any, paths: list[str], dtype: Any) -> Any:
    from reference import nf4

    def change(data: Tensor, W: Tensor) -> Tensor:
        levels = nf4.codebook()
        scaled = W.flatten() / nf4.quantize(W)[1].repeat_interleave(64)
        return nf4.pack(torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2, right=True).to(torch.uint8))

    return _repacked(model, paths, dtype, change)


@_base("codes")
def has_an_absmax_of_the_wrong_block(model: Any, paths: list[str], dtype: Any) -> Any:
    forms = bitsandbytes.nf4(model, paths, dtype)
    for _, absmax, _ in forms.values():
        absmax.copy_(absmax.roll(1))
    return forms
