"""Count the bytes of all tensors that exist while a program runs on fake tensors.

A training step repeats the same operations for every block and every trainable tensor. Computing each output again
would take several times as long, so a cache stores descriptions of the outputs. The cache holds no tensors, because
cached tensors would never be freed.
"""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CPU, _META = torch.device("cpu"), torch.device("meta")
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


class _Output(NamedTuple):
    """Description of one output tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    view_of: int | None
    """Index of the input whose storage the output shares. None if the output has a new storage."""


class _NotCacheable(Exception):  # noqa: N818
    """Raised for an argument that cannot be part of a key of `outputs`, the cache."""


outputs: dict[Hashable, _Output] = {}
"""Cache of `cached_output`: the call of an operation -> a description of its output. It can be pickled, so that child
processes can send their entries to the parent.
"""


def cached_output(fake: FakeTensorMode, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return `func(*args, **kwargs)`, from the cache if possible. At least one argument is a tensor, fake or real."""
    if func._schema.is_mutable:
        made = args[0] if _writes_only(func, args) else func(*args, **kwargs)
        return kwargs.get("out", made)  # torch's own cache would return a new tensor instead of `out`
    given: list[Tensor] = []
    try:
        named = [(name, _key(value, given)) for name, value in kwargs.items()]
        key = (str(func), torch.get_default_dtype(), _key(args, given), *named)
    except _NotCacheable:
        return func(*args, **kwargs)
    if not any(isinstance(t, FakeTensor) for t in given):
        return func(*args, **kwargs)
    if key in outputs:
        return _recreate(fake, outputs[key], given)
    made = func(*args, **kwargs)
    if (found := _describe(made, given)) is not None:
        outputs[key] = found
    return made


def _writes_only(func: OpOverload, args: tuple[Any, ...]) -> bool:
    """Return whether the first argument is a fake tensor, and the operation only writes values to it."""
    in_place = func._schema.name.endswith("_") and torch.Tag.inplace_view not in func.tags
    return in_place and isinstance(args[0], FakeTensor)


def _key(value: object, given: list[Tensor]) -> Hashable:
    """Return a part of a cache key for an argument of an operation, and append the argument's tensors to `given`.

    Raises _NotCacheable for an argument of an unsupported type.
    """
    if isinstance(value, Tensor):
        given.append(value)
        return isinstance(value, FakeTensor), value.shape, value.stride(), value.dtype, value.storage_offset()
    if isinstance(value, (list, tuple)):
        return tuple([_key(one, given) for one in value])
    if isinstance(value, _PLAIN):
        return type(value), value  # 1 == 1.0, but they give different dtypes
    raise _NotCacheable


def _describe(made: object, given: list[Tensor]) -> _Output | None:
    """Return the description of an output tensor, or None if `_recreate` does not support it."""
    if type(made) is not FakeTensor or made.fake_device != _CPU or any(made is t for t in given):
        return None
    storage = made.untyped_storage()
    view_of = next((i for i, t in enumerate(given) if t.untyped_storage()._cdata == storage._cdata), None)
    found = _Output(made.shape, made.stride(), made.dtype, int(made.storage_offset()), view_of)
    whole = view_of is not None or _empty(found).untyped_storage().nbytes() == storage.nbytes()
    return found if whole else None


def _recreate(fake: FakeTensorMode, found: _Output, given: list[Tensor]) -> Tensor:
    if found.view_of is None:
        return FakeTensor(fake, _empty(found), _CPU)
    view = torch.empty(0, dtype=found.dtype, device=_META)
    storage = given[found.view_of].untyped_storage()
    view.set_(storage, found.offset, found.shape, found.stride)  # type: ignore[call-overload]
    return FakeTensor(fake, view, _CPU)


def _empty(found: _Output) -> Tensor:
    return torch.empty_strided(found.shape, found.stride, dtype=found.dtype, device=_META)


_aten = torch.ops.aten
_FLASH = _aten._scaled_dot_product_flash_attention_for_cpu.default
_GROUPED = _aten._grouped_mm.default
_UNSET = {_aten.empty, _aten.empty_strided}
_FILLED = {_aten.zeros, _aten.ones, _aten.full, _aten.rand, _aten.randn}
_REAL_B = 2**24
"""Largest size in bytes of a tensor that has real data, such as a mask or positions. Programs branch on such values."""


class MemoryTracker(TorchDispatchMode):
    """A mode that counts the bytes of the storages that exist, as torch's CPU allocator would allocate and free them.

    Weights, states and activations are fake tensors (`FakeTensor`), which have shapes, dtypes and strides, and no data.
    A small tensor that is computed without fake inputs has data, such as the mask of a batch of token ids. So programs
    branch as in a real run. If a program reads the value of a fake tensor, it gets 1 or True, so that all values are
    finite. Memory that a kernel allocates and frees internally is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake, self._engine_refs = FakeTensorMode(allow_non_fake_inputs=True), _engine_refs()
        self.now, self.stage = 0, ""
        self.attaching = True
        """True until the step begins. New filled tensors (`torch.zeros`) are weights or states until then, so they are
        fake."""
        self.peaks: dict[str, int] = defaultdict(int)
        """Highest number of bytes in each stage, by the name of the stage."""
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def enter(self, stage: str) -> None:
        """Begin a stage. The bytes that exist now are the first value of its peak."""
        self.stage = stage
        self.peaks[stage] = max(self.peaks[stage], self.now)

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count its outputs."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # first, because torch calls it most often
            return args[0].fake_device
        if func is _aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return args[0].dtype == torch.bool or (1.0 if args[0].is_floating_point() else 1)
        # Autograd accumulates in place if no other code references the first gradient. For subclasses of Tensor, such as
        # FakeTensor, it always accumulates out of place.
        if func is _aten.add.Tensor and _in_backward(args[0]) and _references(args[0]) <= self._engine_refs:
            return args[0].add_(args[1])
        made = self._made(func, args, kwargs)
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return made

    def _made(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is _FLASH:
            # The real output has the query's layout, but the fake output does not: an additional copy would be counted.
            return torch.empty_like(args[0]), *func(*args, **kwargs)[1:]
        if func is _GROUPED:  # the CPU's kernel supports more dtypes, the fake kernel only bfloat16
            return _of_experts(*args, **kwargs)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            return cached_output(self.fake, func, args, kwargs)
        with self.fake:  # there are no tensor inputs, e.g. `torch.zeros`: find the size first
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
    """Return an empty tensor with the shape of a grouped product.

    A grouped product multiplies each row by the matrix of its expert, or computes the gradient of these matrices.
    """
    own = () if weights.dim() > 2 else (len(offsets),)
    return rows.new_empty(*own, rows.shape[-2], weights.shape[-1])


class _Watch(TorchDispatchMode):
    """A mode that records how many references a gradient has each time autograd adds to it."""

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
    """Return the number of references to a gradient while autograd accumulates it and no other code holds it.

    The number differs between processes, so it is measured. A larger number during a step shows that other code holds
    the gradient.
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
    alone = torch._C._storage_Use_Count(old.untyped_storage()._cdata) == 2  # this call holds one of them
    return sys.getrefcount(old) if alone else sys.maxsize
