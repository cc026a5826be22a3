"""Copies of modules equal those of `copy.deepcopy`: values, ties, hooks, and everything that refers to a module."""

from __future__ import annotations

import copy
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from harness.conformance.comparison import whole_model
from harness.methods.module_copy import copied


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.none = nn.Linear(3, 3), None
        self.second = nn.Sequential(OrderedDict(inner=nn.Linear(3, 3), norm=nn.BatchNorm1d(3)))
        self.second.inner.weight = self.first.weight
        self.names, self.alias = {"a": [1, 2]}, self.first
        self.register_buffer("there", torch.arange(3.0), persistent=False)
        self.register_buffer("absent", None)
        self.first.weight.requires_grad_(False)
        self.forward_of_first = self.first.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + self.there


def structure(thing: Any, seen: dict[int, int]) -> Any:
    """Return the types, the values and the references inside an object, in a form that can be compared."""
    if isinstance(thing, str | int | float | bool | None):
        return thing
    if id(thing) in seen:
        return f"object {seen[id(thing)]}"
    seen[id(thing)] = len(seen)
    if isinstance(thing, Tensor):
        return type(thing).__name__, thing.tolist(), thing.requires_grad, str(thing.dtype)
    if isinstance(thing, dict):
        return type(thing).__name__, [(name, structure(value, seen)) for name, value in thing.items()]
    if isinstance(thing, list | tuple):
        return type(thing).__name__, [structure(value, seen) for value in thing]
    if hasattr(thing, "__self__"):
        return "method", thing.__name__, structure(thing.__self__, seen)
    if (hasattr(thing, "__dict__") and not callable(thing)) or isinstance(thing, nn.Module):
        return type(thing).__name__, structure(vars(thing), seen)
    return repr(type(thing))


def hooked() -> nn.Module:
    module = Tied()
    module.second.register_forward_hook(lambda _, __, y: 2 * y)
    return module


@pytest.mark.parametrize("make", [Tied, hooked, lambda: parametrizations.weight_norm(nn.Linear(2, 3))])
def test_a_copy_is_that_of_deepcopy(make: Any) -> None:
    torch.manual_seed(0)
    module = make()
    made, expected = copied(module), copy.deepcopy(module)
    assert structure(made, {}) == structure(expected, {}) == structure(module, {})
    mine = {id(t) for t in (*module.parameters(), *module.buffers(), *module.modules())}
    assert not mine & {id(t) for t in (*made.parameters(), *made.buffers(), *made.modules())}
    stored = {t.untyped_storage().data_ptr() for t in module.parameters()}
    assert not stored & {t.untyped_storage().data_ptr() for t in made.parameters()}


def test_what_refers_to_a_module_refers_to_its_copy() -> None:
    module = Tied()
    held = SimpleNamespace(layers={"first": module.first}, tensors=[module.first.weight], model=module)
    made = copied(held, [module])
    assert made.layers["first"] is made.model.first is made.model.alias
    assert made.tensors[0] is made.model.second.inner.weight
    assert made.model is not module
    x = torch.randn(4, 3)
    assert torch.equal(made.model.eval()(x), module.eval()(x))


def test_plain_modules_do_not_take_the_slow_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """`copy.deepcopy` copies an object by `copy._reconstruct`, and calls it once per module and per dict of hooks."""
    calls, real = [], copy._reconstruct  # type: ignore[attr-defined]
    monkeypatch.setattr(copy, "_reconstruct", lambda *given, **more: (calls.append(1), real(*given, **more))[1])
    module = Tied()
    copied(module)
    few = len(calls)
    copy.deepcopy(module)
    assert 10 * few < len(calls) - few


def test_a_copy_of_a_whole_model_in_another_dtype_keeps_ties_and_what_trains() -> None:
    model = Tied()
    made: Any = whole_model.copied(model, torch.float64)
    assert made.second.inner.weight is made.first.weight
    assert {n: p.requires_grad for n, p in made.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    for name, tensor in whole_model.tensors(model).items():
        copy_of = whole_model.tensors(made)[name]
        assert torch.equal(copy_of, tensor.double() if tensor.is_floating_point() else tensor)
        assert copy_of.dtype == (torch.float64 if tensor.is_floating_point() else tensor.dtype)
