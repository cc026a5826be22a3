"""Count the bytes of existing tensors while a program runs on fake tensors."""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from harness.memory_model.shape_cache import cached_output

_aten = torch.ops.aten
_FLASH = _aten._scaled_dot_product_flash_attention_for_cpu.default
_GROUPED = _aten._grouped_mm.default
_UNSET = {_aten.empty, _aten.empty_strided}
_FILLED = {_aten.zeros, _aten.ones, _aten.full, _aten.rand, _aten.randn}
_REAL_B = 2**24
"""Bytes up to which tensors without fake inputs (masks, positions) have real data, because programs branch on them."""


class MemoryTracker(TorchDispatchMode):
    """Count the bytes of storages that operations allocate and free, as torch's CPU allocator would.

    Weights, states and activations are fake tensors (`FakeTensor`), which have shapes, dtypes and strides, and no data.
    Small tensors without fake inputs, such as the mask of a batch of real ids, have data, so that programs branch as in a
    run. The value of a fake tensor is 1, or True: everything is finite. Memory that a kernel allocates and frees internally
    is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake, self._engine_refs = FakeTensorMode(allow_non_fake_inputs=True), _engine_refs()
        self.now, self.stage = 0, ""
        self.attaching = True
        """Whether new filled tensors (`torch.zeros`) are weights or states, and so fake, however small."""
        self.peaks: dict[str, int] = defaultdict(int)
        """Highest count of each stage, by its name."""
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def enter(self, stage: str) -> None:
        """Begin a stage."""
        self.stage = stage
        self.peaks[stage] = max(self.peaks[stage], self.now)

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count its outputs."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # called for every tensor, all the time
            return args[0].fake_device
        if func is _aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return args[0].dtype == torch.bool or (1.0 if args[0].is_floating_point() else 1)
        # Autograd accumulates in place if nothing else references the first gradient, but out of place for subclasses of
        # Tensor, such as FakeTensor.
        if func is _aten.add.Tensor and _in_backward(args[0]) and _references(args[0]) <= self._engine_refs:
            return args[0].add_(args[1])
        made = self._made(func, args, kwargs)
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return made

    def _made(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is _FLASH:
            # The real output has the query's layout, the fake one does not: a further copy would be counted.
            return torch.empty_like(args[0]), *func(*args, **kwargs)[1:]
        if func is _GROUPED:  # a CPU supports more dtypes, but its fake kernel only bfloat16
            return _of_experts(*args, **kwargs)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            return cached_output(self.fake, func, args, kwargs)
        with self.fake:  # no tensor inputs, e.g. `torch.zeros`: look at the size first
            made = func(*args, **kwargs)
        no_data = func.overloadpacket in (_UNSET | _FILLED if self.attaching else _UNSET)
        large = not isinstance(made, Tensor) or made.untyped_storage().nbytes() > _REAL_B
        return made if no_data or large else func(*args, **kwargs)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen[key] = weakref.ref(storage, self._gone(key, size))
            self.now += size
            self.peaks[self.stage] = max(self.peaks[self.stage], self.now)

    def _gone(self, key: int, size: int) -> Callable[[object], None]:
        def gone(_: object) -> None:
            del self._seen[key]
            self.now -= size

        return gone


def _of_experts(rows: Tensor, weights: Tensor, offsets: Tensor, *_: object, **__: object) -> Tensor:
    """Return an empty output of a grouped product: of rows with their experts' matrices, or of the latter's gradient."""
    own = () if weights.dim() > 2 else (len(offsets),)
    return rows.new_empty(*own, rows.shape[-2], weights.shape[-1])


class _Watch(TorchDispatchMode):
    """Record the number of references to a gradient while autograd accumulates it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _aten.add.Tensor and _in_backward(args[0]):
            self.seen.append(_references(args[0]))
        return func(*args, **(kwargs or {}))


def _engine_refs() -> int:
    """Return the number of references to a gradient that only autograd holds, while it accumulates.

    Measured each time, because it depends on the process. An operand in other code has one more.
    """
    watch = _Watch()
    with FakeTensorMode():
        x = torch.empty(1, requires_grad=True)
        with watch:
            y = x * 2
            ((y * 3).sum() + (y * 4).sum()).backward()
    return max(watch.seen)


def _in_backward(old: object) -> bool:
    return torch._C._current_graph_task_id() != -1 and isinstance(old, FakeTensor)


def _references(old: Tensor) -> int:
    """Return the number of references to a tensor, or sys.maxsize if another tensor shares its storage."""
    alone = torch._C._storage_Use_Count(old.untyped_storage()._cdata) == 2  # one of them is this call's
    return sys.getrefcount(old) if alone else sys.maxsize
