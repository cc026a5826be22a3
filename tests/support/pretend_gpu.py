"""A device that is only pretended: its tensors compute on the CPU, and refuse what a GPU's tensors refuse.

No kernel runs. What is tried is the code around kernels: where tensors and random numbers are made, and where they meet.
The first call of `pretended` registers the device with torch for the rest of the process, so the code that is tried has
its own process.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map

from harness.conformance import process_settings

NAME = "pretended"
_COPIES = {"aten::copy_", "aten::_to_copy"}
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
"""Operators whose indices may be on the CPU."""
_FACTORIES = (
    "empty.memory_format", "empty_strided", "eye", "eye.m", "arange", "arange.start", "arange.start_step", "linspace",
    "tril_indices", "triu_indices",
)  # fmt: skip
"""Operators that torch asks a device for, or that torch makes of others by changing a tensor's size."""
_PRODUCTS = (
    "addmm", "addmv", "baddbmm", "bmm", "conv1d", "conv2d", "conv2d.padding", "conv3d", "linear", "matmul", "mm", "mv",
)  # fmt: skip
"""Operators whose tensors autocast casts."""
_random = torch.Generator()
"""The device's own random numbers, as a GPU has its own. The state of the CPU's generator does not include them."""
_library: list[torch.library.Library] = []


class OnGpu(Tensor):
    """A tensor that says it is on a GPU. Its numbers are in `elem`, on the CPU."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor) -> OnGpu:
        made: OnGpu = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, elem.size(), strides=elem.stride(), storage_offset=elem.storage_offset(), dtype=elem.dtype,
            layout=elem.layout, device=torch.device(NAME, 0), requires_grad=elem.requires_grad,
        )  # fmt: skip
        made.elem = elem
        return made

    def __repr__(self) -> str:
        return f"OnGpu({self.elem!r})"

    # With these two, `module.to` swaps its parameters instead of writing to their `data`.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["elem"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: Any, size: Any, stride: Any) -> OnGpu:
        return OnGpu(inner["elem"])

    def __deepcopy__(self, memo: dict[int, Any]) -> OnGpu:
        if not self.is_leaf:
            raise RuntimeError("only leaves of the graph can be copied")
        if id(self) not in memo:
            made = _rebuilt(*deepcopy(self.__reduce_ex__(0)[1], memo))
            made.grad = deepcopy(self.grad, memo)
            memo[id(self)] = made
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, _: object) -> tuple[Any, ...]:
        further = {name: value for name, value in vars(self).items() if name != "elem"}
        return _rebuilt, (self.elem, self.requires_grad, further)

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)  # type: ignore[attr-defined,no-any-return]

    @data.setter
    def data(self, other: Any) -> None:
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.elem = other.elem

    def tolist(self) -> Any:
        return self.elem.tolist()

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.elem.untyped_storage()

    def set_(self, *of: Any) -> OnGpu:
        """Return a new tensor, since a tensor of this class cannot change its memory."""
        return OnGpu(self.elem.set_(*of))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _rebuilt(elem: Tensor, requires_grad: bool, further: dict[str, Any]) -> OnGpu:
    made = OnGpu(elem)
    made.requires_grad_(requires_grad)
    made.__dict__ |= further
    return made


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    asked = kwargs.get("device")
    asked = torch.device(asked) if asked is not None else None
    there = isinstance(args[0], OnGpu) if name == "aten::copy_" else asked is None or asked.type == NAME
    _require_one_device(func, name, args, kwargs)
    if there and kwargs.get("generator") is not None:
        raise RuntimeError(f"{name}: expected a generator of one device, found one of the CPU for a tensor of a GPU")
    if there and asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    plain = [tree_map(lambda t: t.elem if isinstance(t, OnGpu) else t, one) for one in (args, kwargs)]
    draws = there and torch.Tag.nondeterministic_seeded in func.tags
    returned = _drawn(lambda: func(*plain[0], **plain[1])) if draws else func(*plain[0], **plain[1])
    if torch.Tag.inplace_view in func.tags:
        with no_dispatch():
            func(*args, **kwargs)  # changes the size that the wrapper states, too
    theirs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, OnGpu)]
    if any(t.shape != t.elem.shape for t in theirs):
        raise NotImplementedError(f"{name}: a tensor of the pretended device cannot change its size")
    same = {id(t.elem): t for t in theirs}

    def back(t: Any) -> Any:
        if not (isinstance(t, Tensor) and there):
            return t
        if id(t) in same:
            return same[id(t)]
        of_ordinary = func.is_view and not args[0].is_inference()  # a view of an ordinary tensor is ordinary, too
        with torch.inference_mode(torch.is_inference_mode_enabled() and not of_ordinary):
            return OnGpu(t)

    return tree_map(back, returned)


def _require_one_device(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise RuntimeError if tensors of the CPU meet tensors of the device in an operator that does not allow that.

    Copies allow it, indices may be on the CPU, and elementwise operators read a CPU tensor without dimensions.
    """
    if name in _COPIES:
        return
    read, written = (args[0], *args[2:]) if name in _INDEXED else args, kwargs.get("out")
    if name.endswith("_"):
        read, written = read[1:], read[0]
    one_number = torch.Tag.pointwise in func.tags or name in _INDEXED
    left = [t for t in _on_cpu((read, kwargs)) if t.dim() or not one_number] + _on_cpu(written)
    if left:
        raise RuntimeError(f"{name}: expected all tensors on one device, found a GPU and cpu {tuple(left[0].shape)}")


def _on_cpu(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor) and t.device.type == "cpu"]


def _drawn(act: Callable[[], Any]) -> Any:
    """Return the result of `act`, which draws from the device's random numbers instead of the CPU's."""
    before = torch.get_rng_state()
    torch.set_rng_state(_random.get_state())
    try:
        return act()
    finally:
        _random.set_state(torch.get_rng_state())
        torch.set_rng_state(before)


class _Module(backend_registration._DummyBackendModule):
    """Functions that torch calls for a kind of device."""

    _initialized = True  # activation checkpointing then restores the random numbers

    def device(self, *_: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def get_rng_state(self, *_: Any) -> Tensor:
        return _random.get_state()

    def set_rng_state(self, state: Tensor, *_: Any) -> None:
        _random.set_state(state)

    def manual_seed_all(self, seed: int) -> None:
        _random.manual_seed(seed)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _register() -> None:
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    library, every = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    _library.extend([library, every])  # torch forgets the functions with the library
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")  # `torch.tensor` copies by it
    for name in _PRODUCTS:
        library.impl(name, _cast_by_autocast(operator.attrgetter(name)(torch.ops.aten)), "AutocastPrivateUse1")
    for name in _FACTORIES:
        library.impl(name, _factory(operator.attrgetter(name)(torch.ops.aten)), "PrivateUse1")


def _cast_by_autocast(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def narrow(one: Any) -> Any:
        floats = isinstance(one, Tensor) and one.is_floating_point() and one.dtype != torch.float64
        return one.to(torch.get_autocast_dtype(NAME)) if floats else one

    def cast(*of: Any, **how: Any) -> Tensor:
        given = tree_map(narrow, of)
        with torch.autocast(NAME, enabled=False):
            return product(*given, **how)

    return cast


def _copy_from(source: Tensor, target: OnGpu, non_blocking: bool = False) -> OnGpu:
    target.elem.copy_(source.elem if isinstance(source, OnGpu) else source)
    return target


def _factory(made: Callable[..., Tensor]) -> Callable[..., OnGpu]:
    return lambda *of, device=None, pin_memory=None, **how: OnGpu(made(*of, device="cpu", **how))


@contextmanager
def pretended() -> Iterator[torch.device]:
    """Yield the pretended device.

    torch.compile does nothing meanwhile. It traces fake tensors, and those that the traced code makes are not of the class
    OnGpu.
    """
    if not _library:
        _register()
    seed = patch.object(process_settings, "seed", torch.manual_seed)  # its own seeds GPUs of CUDA only
    with patch("torch.compile", lambda function, **_: function), seed:
        yield torch.device(NAME, 0)
