"""LoRA layers that are given one and the same input, as q, k and v are: the first that is called computes for all."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from harness.kernels.torch.lora_linear import is_plain
from harness.kernels.torch.lora_linears import LoraFactors, lora_linears

FAMILIES = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"), ("to_q", "to_k", "to_v"), ("q", "k", "v"),
    ("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"),
)  # fmt: skip
"""What such layers are called. Names and not what is seen to happen, so that a first step has the bits of later ones."""
PATIENCE = 8
"""How often more a layer's output may be computed in vain than not, as in cross-attention, before it no longer is; from
then on it is computed alone, which may round otherwise."""


class Sibling(nn.Module):
    """A layer that can be computed alone, or with others; by its tensors and scaling, and by those of its base."""

    family: Family
    place: int
    base: Any
    scaling: float

    def alone(self, x: Tensor) -> Tensor:
        """Return its output by itself."""
        raise NotImplementedError

    def factors(self, x: Tensor) -> LoraFactors | None:
        """Return what its output for this x is made of, or None where only `alone` will do."""
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy, whose siblings are those that are copied with it."""
        super().__setstate__(state)
        self.family.join(self)


class Family:
    """Layers of one input. When one is called the others are computed too, and wait until they are asked.

    That is: with the very tensor, unchanged, by the same thread, with nothing of their own changed, and before a backward
    pass frees what they would need. Any other call computes then. What is written through `.data` is seen by nobody, as
    autograd does not see it. What waits, waits until the next call, or until x is gone. All outputs are of one node of the
    graph, so that a backward pass through one of them, unless it retains the graph, is the only one.

    While what is kept for the backward pass goes through hooks each is computed alone, for checkpointing wants the
    recomputation to keep just what the first pass kept, and may end it early.
    """

    def __init__(self) -> None:
        self._members: dict[int, weakref.ref[Sibling]] = {}
        self._vain: dict[int, int] = {}
        self._last = threading.local()

    def __reduce__(self) -> Any:
        """Copy no member: those that are copied as well join by themselves."""
        return Family, ()

    def join(self, layer: Sibling) -> None:
        """Take in a layer; it is not kept alive."""
        self._members[layer.place] = weakref.ref(layer)
        self._vain[layer.place] = 0

    def __call__(self, layer: Sibling, x: Tensor) -> Tensor:
        """Return the layer's output."""
        if len(self._members) < 2 or torch.compiler.is_compiling():
            return layer.alone(x)
        if x.is_inference() or _hooked():  # a tensor of inference mode does not say whether it was changed
            return layer.alone(x)
        last: _Call | None = getattr(self._last, "call", None)
        if last is not None and last.is_of(x):
            state, output = last.ahead.pop(layer.place, (None, None))
            if output is not None and _same(state, _state(layer)):
                self._vain[layer.place] = max(0, self._vain[layer.place] - 1)
                return output
        return self._lead(layer, x, last)

    def _lead(self, layer: Sibling, x: Tensor, last: _Call | None) -> Tensor:
        if last is not None:
            for place in last.ahead:
                self._vain[place] += 1
            last.ahead.clear()  # what waits there holds a graph, which holds it
        self._last.call = call = _Call(x)
        own = _fitting(layer, x)
        if own is None:
            return layer.alone(x)
        joining: list[tuple[int, Any, LoraFactors]] = []
        for place, reference in sorted(self._members.items()):
            one = reference()
            if one is None or one is layer or self._vain[place] >= PATIENCE:
                continue
            state, it = _state(one), _fitting(one, x)
            if state is not None and it is not None and _trains(it, x) == _trains(own, x):
                joining.append((place, state, it))
        if not joining:
            return layer.alone(x)
        output, *others = lora_linears(x, [own, *(it for _, _, it in joining)], call.ahead)
        call.ahead |= {place: (state, y) for (place, state, _), y in zip(joining, others, strict=True)}
        return output


class _Call:
    """A call of a layer that led, and what was computed in advance: place of a layer -> its state and its output."""

    def __init__(self, x: Tensor) -> None:
        self.ahead: dict[int, tuple[Any, Tensor]] = {}
        ahead = self.ahead
        self._x = weakref.ref(x, lambda _: ahead.clear())
        self._how = _how(x)

    def is_of(self, x: Tensor) -> bool:
        """Whether it was given this tensor, as it is now."""
        return self._x() is x and self._how == _how(x)


def meet(layers: Mapping[str, Any]) -> None:
    """Make families of those of these layers that have one parent and the names of siblings. layers: path -> a Sibling."""
    families: dict[tuple[str, tuple[str, ...]], Family] = {}
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        among = next((names for names in FAMILIES if name in names), (name,))
        layer.family = families.setdefault((parent, among), Family())
        layer.place = among.index(name)
        layer.family.join(layer)


def _how(x: Tensor) -> tuple[Any, ...]:
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None  # another would not wait for what was computed
    return (
        x._version, x.data_ptr(), x.requires_grad, torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(x.device.type), stream,
    )  # fmt: skip


def _state(layer: Sibling) -> tuple[Any, ...] | None:
    """Return what a layer computes by, each tensor with all that tells of a change; None where one does not tell."""
    base = layer.base
    found = [
        (t, (t._version, t.data_ptr(), t.requires_grad)) if not t.is_inference() else None
        for of in (layer._parameters, layer._buffers, base._parameters, base._buffers)
        for t in of.values()
        if t is not None
    ]
    return None if None in found else (layer.scaling, is_plain(base, type(base)), found)


def _same(one: tuple[Any, ...] | None, other: tuple[Any, ...] | None) -> bool:
    """Whether two states are of the same tensors, unchanged. Held and not only their ids, which are used again."""
    if one is None or other is None or one[:2] != other[:2] or len(one[2]) != len(other[2]):
        return False
    return all(t is u and told == now for (t, told), (u, now) in zip(one[2], other[2], strict=True))


def _fitting(layer: Sibling, x: Tensor) -> LoraFactors | None:
    """Return the layer's factors if x can be multiplied by them together with others'."""
    it = layer.factors(x)
    if (
        it is None
        or it.A.shape[-1] != x.shape[-1]
        or any(t.dtype != x.dtype or t.device != x.device for t in (it.A, it.B))
    ):
        return None
    return it


def _trains(it: LoraFactors, x: Tensor) -> bool:
    """Whether this output takes part in a backward pass: outputs of one call do all, or none."""
    dense = it.W if isinstance(it.W, Tensor) else None
    return any(t is not None and t.requires_grad for t in (x, dense, it.bias, it.A, it.B))


def _hooked() -> bool:
    """Return whether hooks are set on what autograd keeps; also where this torch does not tell."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None
