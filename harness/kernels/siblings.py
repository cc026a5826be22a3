"""LoRA layers that are given one and the same input, as q, k and v are: the first that is called computes for all."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from harness.kernels.lora_linears import LoraFactors, lora_linears

FAMILIES = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"), ("to_q", "to_k", "to_v"), ("q", "k", "v"),
    ("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"),
)  # fmt: skip
"""What such layers are called. Names and not what is seen to happen, so that a program that is started again computes the
same bits from its first step on."""
PATIENCE = 100
"""How often more a layer's output may be computed in vain than not, as in cross-attention, before that stops."""


class Sibling(Protocol):
    """A layer that can be computed alone, or with others."""

    family: Family

    def alone(self, x: Tensor) -> Tensor:
        """Return its output by itself."""

    def factors(self, x: Tensor) -> LoraFactors | None:
        """Return what its output for this x is made of, or None where only `alone` will do."""

    def held(self) -> Sequence[Tensor]:
        """Return the tensors that it computes by."""


class Family:
    """Layers of one input. When one is called the others are computed too, and wait until they are asked.

    That is: with the very tensor, unchanged, by the same thread, with their own tensors unchanged, and before a backward
    pass frees what they would need. Any other call is right as well, and computed then. While what is kept for the backward
    pass goes through hooks each is computed alone, for checkpointing wants the recomputation to keep just what the first
    pass kept, and may end it early.
    """

    def __init__(self, members: Sequence[Sibling]) -> None:
        self._members, self._vain, self._last = list(members), dict.fromkeys(map(id, members), 0), threading.local()

    def __getstate__(self) -> list[Sibling]:
        return self._members

    def __setstate__(self, members: list[Sibling]) -> None:
        self.__init__(members)  # type: ignore[misc]

    def __call__(self, layer: Sibling, x: Tensor) -> Tensor:
        """Return the layer's output."""
        if len(self._members) < 2 or torch.compiler.is_compiling():
            return layer.alone(x)
        if x.is_inference() or _hooked():  # a tensor of inference mode does not say whether it was changed
            return layer.alone(x)
        last: _Call | None = getattr(self._last, "call", None)
        if last is not None and last.is_of(x):
            state, output = last.ahead.pop(id(layer), (None, None))
            if output is not None and state == _state(layer):
                self._vain[id(layer)] -= 1
                return output
        return self._lead(layer, x, last)

    def _lead(self, layer: Sibling, x: Tensor, last: _Call | None) -> Tensor:
        for one in last.ahead if last is not None else ():
            self._vain[one] += 1
        self._last.call = call = _Call(x)
        if (own := layer.factors(x)) is None:
            return layer.alone(x)
        joining = [
            (one, it)
            for one in self._members
            if one is not layer and self._vain[id(one)] < PATIENCE and (it := one.factors(x)) is not None
        ]
        if not joining:
            return layer.alone(x)
        output, *others = lora_linears(x, [own, *(factors for _, factors in joining)], call.ahead)
        call.ahead |= {id(one): (_state(one), y) for (one, _), y in zip(joining, others, strict=True)}
        return output


class _Call:
    """A call of a layer that led, and what was computed in advance: id of a layer -> its state and its output."""

    def __init__(self, x: Tensor) -> None:
        self._x: Callable[[], Tensor | None] = weakref.ref(x)
        self._how = _how(x)
        self.ahead: dict[int, tuple[tuple[Any, ...], Tensor]] = {}

    def is_of(self, x: Tensor) -> bool:
        """Whether it was given this tensor, as it is now."""
        return self._x() is x and self._how == _how(x)


def meet(layers: Mapping[str, Any]) -> None:
    """Make families of those of these layers that have one parent and the names of siblings. layers: path -> a Sibling."""
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        among = next((names for names in FAMILIES if name in names), (name,))
        paths = [f"{parent}.{one}" if parent else one for one in among]
        here = [layers[one] for one in paths if one in layers]
        layer.family = here[0].family if layer is not here[0] else Family(here)


def _how(x: Tensor) -> tuple[Any, ...]:
    return x._version, x.requires_grad, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def _state(layer: Sibling) -> tuple[Any, ...]:
    return tuple((id(t), t._version, t.requires_grad) for t in layer.held())


def _hooked() -> bool:
    """Return whether hooks are set on what autograd keeps; also where this torch does not tell."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None
