"""LoRA layers with the same input, such as q, k and v. A call of one layer can compute the outputs of all."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from harness.kernels.torch.lora_linear import is_plain
from harness.kernels.torch.lora_linears import LoraFactors, lora_linears

GROUPS = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"), ("to_q", "to_k", "to_v"), ("q", "k", "v"),
    ("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"),
)  # fmt: skip
"""Groups of layer names. The layers of a group have the same input if they have the same parent module.

Layers are grouped by name. If observed calls decided, the first step would be rounded differently from later steps.
"""
MAX_UNUSED_OUTPUTS = 8
"""Number of unused outputs of a layer from which on calls of the group's other layers no longer compute its output.

Each used output lowers the number by one, but not below zero. In cross-attention, outputs stay unused, because the
layers have different inputs. An output that is computed alone may be rounded differently.
"""


class SharedInputLayer(nn.Module):
    """A layer that can be computed alone, or together with other layers of the same input."""

    input_group: InputGroup
    place: int
    """Position of the layer in its group."""
    base: Any
    scaling: float

    def forward_alone(self, x: Tensor) -> Tensor:
        """Return this layer's output, without computing the other layers of its group."""
        raise NotImplementedError

    def factors(self, x: Tensor) -> LoraFactors | None:
        """Return the factors for computing the output for x with other layers, or None if this is impossible."""
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied layer, and let it join the group of the layers that were copied with it."""
        super().__setstate__(state)
        self.input_group.join(self)


class InputGroup:
    """Layers with the same input. A call of one layer also computes the others, and saves their outputs.

    A saved output is used if the same thread calls the layer with the same tensor. Neither this tensor nor the layer's
    own tensors may have been modified, no optimizer may have stepped, and no backward pass may have freed the saved
    tensors of autograd. In any other case, the call computes the outputs again. As in autograd, writes through `.data`
    are not detected. Outputs are saved until the next call that computes, or until the input is freed. All outputs
    belong to one node of the graph. Only one backward pass can therefore go through them, unless it retains the graph.

    Under saved-tensor hooks each layer is computed alone, because checkpointing uses such hooks. The recomputation in
    checkpointing must save exactly the same tensors as the first pass, and may stop early.
    """

    def __init__(self) -> None:
        self._members: dict[int, weakref.ref[SharedInputLayer]] = {}
        self._unused: dict[int, int] = {}
        self._last = threading.local()

    def __reduce__(self) -> Any:
        """Return what pickle and copy need to make an empty group. Copied layers join the empty group by themselves."""
        return InputGroup, ()

    def join(self, layer: SharedInputLayer) -> None:
        """Add a layer. The group holds only a weak reference to the layer."""
        self._members[layer.place] = weakref.ref(layer)
        self._unused[layer.place] = 0

    def __call__(self, layer: SharedInputLayer, x: Tensor) -> Tensor:
        """Return the layer's output for x: a saved output if a valid one exists, else a computed one."""
        if len(self._members) < 2 or torch.compiler.is_compiling():
            return layer.forward_alone(x)
        if x.is_inference() or _has_hooks():  # an inference tensor has no version counter
            return layer.forward_alone(x)
        last: _Call | None = getattr(self._last, "call", None)
        if last is not None and last.is_of(x):
            state, output = last.precomputed.pop(layer.place, (None, None))
            if output is not None and _same(state, _state(layer)):
                self._unused[layer.place] = max(0, self._unused[layer.place] - 1)
                return output
        return self._lead(layer, x, last)

    def _lead(self, layer: SharedInputLayer, x: Tensor, last: _Call | None) -> Tensor:
        if last is not None:
            for place in last.precomputed:
                self._unused[place] += 1
            last.precomputed.clear()  # breaks a cycle of the outputs and their graph
        self._last.call = call = _Call(x)
        own = _factors(layer, x)
        if own is None:
            return layer.forward_alone(x)
        joining: list[tuple[int, Any, LoraFactors]] = []
        for place, reference in sorted(self._members.items()):
            member = reference()
            if member is None or member is layer or self._unused[place] >= MAX_UNUSED_OUTPUTS:
                continue
            state, factors = _state(member), _factors(member, x)
            if state is not None and factors is not None and _trains(factors, x) == _trains(own, x):
                joining.append((place, state, factors))
        if not joining:
            return layer.forward_alone(x)
        output, *outputs = lora_linears(x, [own, *(factors for _, _, factors in joining)], call.precomputed)
        call.precomputed |= {place: (state, y) for (place, state, _), y in zip(joining, outputs, strict=True)}
        return output


class _Call:
    """A call that computed several layers, with the outputs that have not been used yet."""

    def __init__(self, x: Tensor) -> None:
        self.precomputed: dict[int, tuple[Any, Tensor]] = {}
        """Place of a layer in its group -> the layer's state (see `_state`) and its output."""
        precomputed = self.precomputed
        self._x = weakref.ref(x, lambda _: precomputed.clear())
        self._context = _context(x)

    def is_of(self, x: Tensor) -> bool:
        """Return whether x was the input of this call, and neither x nor its context has changed since.

        The context consists of the modes of torch, the CUDA stream and the number of optimizer steps.
        """
        return self._x() is x and self._context == _context(x)


def link(layers: Mapping[str, Any]) -> None:
    """Group the layers that have the same parent and whose names are in one group of `GROUPS`.

    layers: path -> SharedInputLayer.
    """
    _optimizer_steps()
    groups: dict[tuple[str, tuple[str, ...]], InputGroup] = {}
    for path, layer in layers.items():
        parent, _, name = path.rpartition(".")
        names = next((group for group in GROUPS if name in group), (name,))
        layer.input_group = groups.setdefault((parent, names), InputGroup())
        layer.place = names.index(name)
        layer.input_group.join(layer)


@functools.cache
def _optimizer_steps() -> list[int]:
    """Return a list with one number: the optimizer steps of this process since this function was first called.

    Saved outputs are not used after a step. Some optimizers (fused ones, and bitsandbytes) write into tensors without
    raising the tensors' version, so the version alone does not reveal the change.
    """
    steps = [0]

    def count(*_: Any) -> None:
        steps[0] += 1

    register_optimizer_step_post_hook(count)
    return steps


def _context(x: Tensor) -> tuple[Any, ...]:
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None  # another stream would not wait for the outputs
    return (
        x._version, x.data_ptr(), x.requires_grad, torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(x.device.type), stream, _optimizer_steps()[0],
    )  # fmt: skip


def _state(layer: SharedInputLayer) -> tuple[Any, ...] | None:
    """Return the state of a layer: its scaling, whether its base has no hooks, and its tensors.

    Each tensor comes with its version, address and requires_grad. If a tensor has no version, return None.
    """
    base = layer.base
    tensors = [
        (t, (t._version, t.data_ptr(), t.requires_grad)) if not t.is_inference() else None
        for owner in (layer._parameters, layer._buffers, base._parameters, base._buffers)
        for t in owner.values()
        if t is not None
    ]
    return None if None in tensors else (layer.scaling, is_plain(base, type(base)), tensors)


def _same(one: tuple[Any, ...] | None, other: tuple[Any, ...] | None) -> bool:
    """Return whether two states of a layer are the same, so that no tensor was replaced or modified.

    Tensors are compared as objects, because Python reuses ids.
    """
    if one is None or other is None or one[:2] != other[:2] or len(one[2]) != len(other[2]):
        return False
    return all(t is u and before == now for (t, before), (u, now) in zip(one[2], other[2], strict=True))


def _factors(layer: SharedInputLayer, x: Tensor) -> LoraFactors | None:
    """Return the layer's factors for x, or None if the layer cannot be computed together with other layers."""
    factors = layer.factors(x)
    if (
        factors is None
        or factors.A.shape[-1] != x.shape[-1]
        or any(t.dtype != x.dtype or t.device != x.device for t in (factors.A, factors.B))
    ):
        return None
    return factors


def _trains(factors: LoraFactors, x: Tensor) -> bool:
    """Return whether the layer's output requires a gradient. All outputs of one call must agree in this."""
    dense = factors.W if isinstance(factors.W, Tensor) else None
    return any(t is not None and t.requires_grad for t in (x, dense, factors.bias, factors.A, factors.B))


def _has_hooks() -> bool:
    """Return whether saved-tensor hooks are set. If this version of torch does not tell, return True."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None
