"""The bytes of tensors that exist, counted while a program runs on tensors without data."""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
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
"""Bytes up to which what follows from no weight (masks, positions) is computed: programs branch on it."""


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of the storages that operations make and drop, as torch's CPU allocator would be asked for them.

    Tensors that stand for weights, states and activations are `FakeTensor`s, which have shapes, dtypes and strides, and no
    data. What is computed from none of them, such as a mask of a batch of real ids, is computed, if it is small: what a
    program makes of it is then what it does in a run. A number that is asked of a tensor without data is 1, or True: all is
    finite, the loss is fine.

    attaching: whether what is made of a size alone (`torch.zeros`) is a weight or a state, and has no data, however small.
    most: the highest count in each stage, by its name; `enter` begins one. What a kernel takes for itself alone, and gives
    back, is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake, self._engine_refs = FakeTensorMode(allow_non_fake_inputs=True), _engine_refs()
        self.now, self.stage, self.attaching = 0, "", True
        self.most: dict[str, int] = defaultdict(int)
        self._seen: dict[int, weakref.ref[Any]] = {}

    def enter(self, stage: str) -> None:
        """Begin a stage, with what exists now."""
        self.stage = stage
        self.most[stage] = max(self.most[stage], self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count what it made."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # asked of every tensor, all the time
            return args[0].fake_device
        if func is _aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return args[0].dtype == torch.bool or (1.0 if args[0].is_floating_point() else 1)
        # Autograd adds in the memory of the first gradient if nobody else has that; but out of place to subclasses, as
        # tensors without data are, to be right for any of them.
        if func is _aten.add.Tensor and _in_backward(args[0]) and _references(args[0]) <= self._engine_refs:
            return args[0].add_(args[1])
        made = self._made(func, args, kwargs)
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return made

    def _made(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is _FLASH:
            # Laid out as its query is, which what torch knows of its shape does not say: a copy more would be counted.
            return torch.empty_like(args[0]), *func(*args, **kwargs)[1:]
        if func is _GROUPED:  # which a CPU computes in other dtypes too; torch knows its shape in bfloat16 alone
            return _of_experts(*args, **kwargs)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            return cached_output(self.fake, func, args, kwargs)
        with self.fake:  # made from nothing, e.g. by `torch.zeros`: is it small?
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
            self.most[self.stage] = max(self.most[self.stage], self.now)

    def _gone(self, key: int, size: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            del self._seen[key]
            self.now -= size

        return gone


def _of_experts(rows: Tensor, weights: Tensor, offsets: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return a product of rows with the matrix of each one's expert; or of two matrices, the gradient of these."""
    own = () if weights.dim() > 2 else (len(offsets),)
    return rows.new_empty(*own, rows.shape[-2], weights.shape[-1])


class _Watch(TorchDispatchMode):
    """Keeps how many references a gradient has while autograd adds to it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten.add.Tensor and _in_backward(args[0]):
            self.seen.append(_references(args[0]))
        return func(*args, **(kwargs or {}))


def _engine_refs() -> int:
    """Return how many references a gradient has while autograd alone has it and adds to it.

    Looked at each time, for it depends on what else goes on in the process. An operand in somebody's code has one more.
    """
    watch = _Watch()
    with FakeTensorMode():
        x = torch.empty(1, requires_grad=True)
        with watch:
            y = x * 2
            ((y * 3).sum() + (y * 4).sum()).backward()
    return max(watch.seen)


def _in_backward(old: Any) -> bool:
    return torch._C._current_graph_task_id() != -1 and isinstance(old, FakeTensor)


def _references(old: Tensor) -> int:
    """Count the references to a tensor; without end where another tensor has its memory too."""
    alone = torch._C._storage_Use_Count(old.untyped_storage()._cdata) == 2  # one of them is this call's
    return sys.getrefcount(old) if alone else sys.maxsize
