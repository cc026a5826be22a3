"""Find out whether a function leaves memory behind at every call, and whether tensors are views of much larger ones."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from harness.conformance.comparison.observations import preserved_state

CALLS = 4


class StorageWatch:
    """Watch of the memory of tensors. It does not keep this memory alive."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self._watched = {name: StorageWeakRef(t.untyped_storage()) for name, t in named.items()}

    def alive(self) -> list[str]:
        """Return the names of the tensors whose memory is still in use. Python's garbage is collected first, if need be."""
        if all(one.expired() for one in self._watched.values()):
            return []
        gc.collect()
        return [name for name, one in self._watched.items() if not one.expired()]


def describe_leak(act: Callable[[], object]) -> str:
    """Call `act` a few times, and describe the memory that every call leaves behind. If no memory is left, return "".

    A cache that holds only the latest results does not grow, so it does not count.
    """
    with _Allocations() as made:
        counts = [_after(act, made) for _ in range(2)]
        if counts[1] - counts[0] >= CALLS:
            counts = [_after(act, made, collect=True) for _ in range(2)]  # a cycle in each call is no leak
    grown = counts[1] - counts[0]
    return f"{grown} tensors are left after {CALLS} calls" if grown >= CALLS else ""


def kept_after_backward(
    layer: nn.Module, tensors: Mapping[str, Tensor], x: Tensor, dy: Tensor, *, training: bool
) -> list[str]:
    """Run a layer forward and backward in the given mode, and drop its input and its output.

    Return the names of those that the layer keeps in memory: `x`, `y` or both. The gradients of `tensors` are restored.
    """
    with preserved_state(layer, tensors, training):
        given = x.clone().requires_grad_(x.is_floating_point())
        y = layer(given)
        watch = StorageWatch({"x": given, "y": y})
        if y.requires_grad:
            y.backward(dy)
        del given, y
    return watch.alive()


def _after(act: Callable[[], object], made: _Allocations, *, collect: bool = False) -> int:
    for _ in range(CALLS):
        act()
    if collect:
        gc.collect()
    return made.alive()


class _Allocations(TorchDispatchMode):
    """Mode that notes the memory of every tensor that torch's operators return, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in _tensors((*args, *(kwargs or {}).values()))}
        returned = func(*args, **(kwargs or {}))
        for one in _tensors((returned,)):
            if one.untyped_storage()._cdata not in given:
                reference = StorageWeakRef(one.untyped_storage())
                self._made[reference.cdata] = reference
        return returned

    def alive(self) -> int:
        """Return the number of noted allocations that are still alive."""
        return sum(not reference.expired() for reference in self._made.values())


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among the arguments or results of an operator of torch, which may be in lists or tuples."""
    for value in values:
        if type(value) is torch.Tensor:
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def describe_views(value: Any, spare: int = 0) -> str:
    """Return a message if the tensors in `value` keep more than twice their own bytes plus `spare` in memory.

    Otherwise, return an empty string. A view keeps the whole memory of the tensor that it is a part of. value: nested
    dicts, lists, tuples, and objects with attributes.
    """
    tensors = list(tensors_in(value))
    own = sum(t.numel() * t.element_size() for t in tensors)
    kept = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    return f"the tensors have {own:,} bytes, and keep {kept:,} bytes in memory" if kept > 2 * own + spare else ""


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested dicts, lists, tuples, and objects with attributes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors_in(one)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from tensors_in(vars(value))
