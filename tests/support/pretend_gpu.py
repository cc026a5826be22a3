"""A device that is only pretended: its tensors compute on the CPU, and refuse to meet a tensor that was left there.

No kernel runs. What is tried is the code around kernels: where tensors are made, and where they meet. The first call of
`pretended` registers the device with torch for the rest of the process, so the code that is tried has its own process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretended"
_COPIES = {"aten::copy_", "aten::_to_copy", "aten::index_put_", "aten::index_put"}


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

    def tolist(self) -> Any:
        return self.elem.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    theirs = [t for t in tensors if isinstance(t, OnGpu)]
    asked = kwargs.get("device")
    asked = torch.device(asked) if asked is not None else None
    name = func._schema.name
    left = [t for t in tensors if not isinstance(t, OnGpu) and t.dim()]
    if theirs and left and name not in _COPIES:
        raise RuntimeError(f"{name}: expected all tensors on one device, found a GPU and cpu {tuple(left[0].shape)}")
    there = (asked.type == NAME) if asked is not None else bool(theirs)
    if name == "aten::copy_":
        there = isinstance(args[0], OnGpu)
    if asked is not None and asked.type == NAME:
        kwargs = kwargs | {"device": torch.device("cpu")}
    kwargs = {k: v for k, v in kwargs.items() if k != "pin_memory"}
    plain = [tree_map(lambda t: t.elem if isinstance(t, OnGpu) else t, one) for one in (args, kwargs)]
    returned = func(*plain[0], **plain[1])
    if name == "aten::_local_scalar_dense":
        return returned
    same = {id(t.elem): t for t in theirs}

    def back(t: Any) -> Any:
        if not (isinstance(t, Tensor) and there):
            return t
        return same[id(t)] if id(t) in same else OnGpu(t)

    return tree_map(back, returned)


class _Module(backend_registration._DummyBackendModule):
    """Functions that torch calls for the random numbers of a kind of device."""

    def get_rng_state(self, *_: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, *_: Any) -> None:
        pass


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def pretended() -> Iterator[torch.device]:
    """Yield the pretended device."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    real = torch.tensor

    def tensor(*data: Any, device: Any = None, **how: Any) -> Tensor:  # torch's own writes to the device's memory
        return real(*data, **how).to(device or "cpu")

    with patch("torch.tensor", tensor), _Mode():
        yield torch.device(NAME, 0)
