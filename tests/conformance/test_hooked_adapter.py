"""An adapter that replaces no module: LoRA by forward hooks conforms, and one whose hook forgets the scaling does not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.conformance import parity_suite
from harness.conformance.case_selection import FEW
from harness.conformance.execution import suite_run
from harness.errors import Unsupported
from harness.methods.registry import Implementation, implements
from harness.records.record import Outcome
from reference.shared.layers import targets


class Hooked:
    """An adapter without a module of its own."""

    can_merge = True

    def __init__(self, model: nn.Module, layers: dict[str, Any], config: Any, scaling: float) -> None:
        self.model, self.layers, self.dropout, self.scaling = model, layers, config.dropout, scaling
        self.factors: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        self.handles: list[Any] = []
        self.weights: dict[str, nn.Parameter] = {}

    def hook(self) -> None:
        for path, layer in self.layers.items():
            self.handles.append(
                layer.register_forward_hook(lambda m, args, out, path=path: self.add(m, args[0], out, path))
            )

    def add(self, layer: nn.Module, x: Tensor, out: Tensor, path: str) -> Tensor:
        A, B = self.factors[path]
        if self.dropout and layer.training:
            x = nn.functional.dropout(x, self.dropout)
        return out + self.scaling * ((x @ A.T) @ B.T)

    def tensors(self) -> dict[str, Tensor]:
        return {f"{path}.{name}": t for path, pair in self.factors.items() for name, t in zip("AB", pair, strict=True)}

    def state(self) -> dict[str, Tensor]:
        return {}

    def regularizer(self) -> None:
        return None

    def parameters(self) -> list[nn.Parameter]:
        return [t for pair in self.factors.values() for t in pair]

    def optimizer(self, lr: float, weight_decay: float) -> None:
        return None

    def after_step(self, step: int) -> None:
        pass

    def merge(self) -> None:
        if self.weights:
            return  # it is merged already
        self.detach()
        for path, layer in self.layers.items():
            A, B = self.factors[path]
            self.weights[path] = layer.weight  # not changed in place: another layer may be tied to it
            merged = layer.weight + self.scaling * (B @ A)
            layer.weight = nn.Parameter(merged.detach(), requires_grad=False)

    def unmerge(self) -> None:
        if not self.weights:
            return  # nothing is merged
        for path, layer in self.layers.items():
            layer.weight = self.weights.pop(path)
        self.hook()

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()


def by_hooks(wrong: float) -> Implementation:
    @implements("lora", name="hooked", dtypes=["float32", "bfloat16"])
    def attach(model: Any, config: Any, generator: torch.Generator) -> Any:
        if config.init != "kaiming":
            raise Unsupported(f"start {config.init}")
        model.requires_grad_(False)
        layers = targets(model, config.targets)
        adapted = Hooked(model, layers, config, wrong * config.scaling)
        for path, layer in layers.items():
            bound, dtype = 1 / math.sqrt(layer.in_features), layer.weight.dtype
            A = torch.empty(config.rank, layer.in_features).uniform_(-bound, bound, generator=generator)
            B = torch.zeros(layer.out_features, config.rank)
            adapted.factors[path] = (nn.Parameter(A.to(dtype)), nn.Parameter(B.to(dtype)))
        adapted.hook()
        return adapted

    return attach


@pytest.fixture(autouse=True)
def on_adaptable_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    # A hook for an embedding or a convolution would be another formula.
    plan = parity_suite.load("lora").model_copy(update={"layers": ["linear"]})
    monkeypatch.setattr(parity_suite, "load", lambda _: plan)


def failed(implementation: Implementation, dtype: str) -> set[str]:
    return {t.check for t in suite_run.run(implementation, dtypes=(dtype,)) if t.result.outcome is Outcome.FAIL}


@pytest.mark.slow
def test_lora_by_hooks_conforms() -> None:
    assert failed(by_hooks(1.0), "float32") == set()


@pytest.mark.nightly
def test_a_hook_with_a_slightly_wrong_scaling_does_not_conform_even_in_bfloat16() -> None:
    assert {"gradient", "strides"} <= failed(by_hooks(1.01), "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [False, True])
def test_a_hook_is_called_under_autocast_too(wrong: bool) -> None:
    right = by_hooks(1.0)

    def attach(model: Any, config: Any, generator: torch.Generator) -> Any:
        adapted = right(model, config, generator)
        add = adapted.add
        adapted.add = lambda layer, x, out, path: (
            out if wrong and torch.is_autocast_enabled("cpu") else add(layer, x, out, path)
        )
        return adapted

    plan = parity_suite.load("lora").model_copy(update={"checks": ["calls"]})
    mine = Implementation("hooked", "method", "lora", attach, dtypes=("float32",))
    case = next(case for case in plan.cases(FEW, ["float32"]) if "init" not in case.config)
    (outcome,) = suite_run.run_case(mine, plan, case, wide=True)
    assert (outcome.result.outcome is Outcome.FAIL) == wrong
    assert not wrong or "under autocast" in outcome.result.tensor
