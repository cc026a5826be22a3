"""Functions of CPU tensors compiled by torch.compile: when to compile, when to run, and what to do on failure.

Compilation takes seconds, so a function is compiled only once, at its first large call. Later calls with other sizes,
threads or modes (inference, autocast, default device) do not compile again. While one thread compiles, calls of other
threads run uncompiled.

Compile times for NF4 on two cores: with an empty inductor cache on disk, 11 s for the first function and 1.6 s for each
further function; with a warm cache, 3.5 s (the import of inductor) and 0.2 s. PEFT_HARNESS_COMPILE=0 in the environment
switches compilation off. PEFT_HARNESS_COMPILE=1 also compiles for smaller tensors.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from threading import Lock
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

LARGE = 1 << 21
"""Smallest number of values of a call that compiles the function.

A model with one such tensor has several, so compilation pays. For smaller tensors, a call gains less than the time that
threads wait for each other on a busy machine.
"""
_SMALL = 1 << 16
"""Smallest number of values of a call that compiles the function if PEFT_HARNESS_COMPILE=1.

With fewer values, a compiled call takes longer than eager torch.
"""

_COMPILING = Lock()
"""Lock that is held while compiling.

All functions share this lock, because a thread would wait for dynamo's global lock anyway.
"""

_OPTIONS: dict[str, Any] = {
    # Otherwise the generated code has the number of threads of the first call.
    "cpp.dynamic_threads": True,
    # Otherwise functions of more than 30 operations write intermediates to memory, which takes three times as long.
    "realize_opcount_threshold": 1 << 20,
    "realize_reads_threshold": 1 << 20,
}


class NotCompiled(Exception):  # noqa: N818 - control flow, not an error
    """Raised by `only_compiled` where a function would run uncompiled. `Compiled` catches this exception."""


def only_compiled() -> None:
    """Raise NotCompiled if the calling function runs uncompiled.

    torch.compile silently runs a function uncompiled under set_stance("force_eager") or with TORCH_COMPILE_DISABLE=1.
    """
    if not torch.compiler.is_compiling():
        raise NotCompiled


class Compiled:
    """A function that is compiled once. It writes to some of its tensors and returns None.

    function: must call `only_compiled()` first. Its tensors must be contiguous and have the same first size. The first
    size may vary between calls, but other sizes and dtypes may not. The values that the function writes must not depend
    on torch's default dtype or device. Raises TypeError if the function is not written in Python.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        if not isinstance(function, FunctionType):
            raise TypeError(f"needs a Python function, got {function!r}")
        # torch.compile allows eight results per code object, which all closures of a function share.
        code = function.__code__.replace()
        self._function = FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)
        self._run: Callable[[Sequence[Tensor]], object] | None = None
        self._failed = False

    def wanted(self, values: int, *tensors: Tensor) -> bool:
        """Return whether to call the compiled function for `tensors`. values: number of values to be processed.

        True if PEFT_HARNESS_COMPILE allows it, there are enough values, all tensors are plain CPU tensors, the CPU has
        wide vectors, no torch mode or transform is active, and no earlier call failed.
        """
        setting = os.environ.get("PEFT_HARNESS_COMPILE")
        if setting == "0" or values < (_SMALL if setting == "1" else LARGE):
            return False
        if self._failed or torch.compiler.is_compiling() or _observed():
            return False
        return _has_vectors() and all(map(_plain, tensors))

    def __call__(self, *tensors: tuple[Tensor, torch.dtype, Sequence[int]], out: Sequence[Tensor]) -> bool:
        """Run the function on views of `tensors`, and return whether it ran.

        If the result is False, the contents of `out` are undefined. tensors: triples of a tensor, a dtype and a shape.
        The function gets the beginning of each tensor's memory as a view of this dtype and shape. out: the tensors that
        the function writes to. An error of the compiler or of compiled code becomes a RuntimeWarning, only once.
        """
        failure, hint = "did not compile", "install a C++ compiler with OpenMP (g++), or "
        try:
            with torch.inference_mode(False), torch.no_grad():
                views = [_view(*tensor) for tensor in tensors]
                torch.get_num_threads()  # also sets OpenMP's number in a new thread
                run = self._run or self._compile(views)
                failure, hint = "failed after compilation", ""
                run(views)
        except NotCompiled:
            return False
        except Exception as error:  # noqa: BLE001 - a compiler fails in many ways; the uncompiled function always works
            self._failed = True
            warnings.warn(
                f"{__name__}: {self._function.__name__} {failure} and now runs uncompiled, several times slower: "
                f"{type(error).__name__}: {str(error).strip()[:300]}. "
                f"hint: {hint}set PEFT_HARNESS_COMPILE=0 to skip compilation",
                RuntimeWarning,
                stacklevel=3,
            )
            return False
        for tensor in out:
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)  # a write to a view raises the view's version only
        return True

    def _compile(self, views: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], object]:
        """Compile the function with inductor, save the compiled function and return it.

        Later calls bypass dynamo's guards. The guards would recompile for another number of threads, for autocast and
        for other settings that do not matter here.
        """
        names = self._function.__code__.co_varnames[: len(views)]

        def backend(graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
            compiled: Callable[..., Any] = torch._inductor.compile(graph, examples, options=_OPTIONS)
            places = [node.target for node in graph.graph.find_nodes(op="placeholder")]
            # The graph takes the tensors in order of first use, and their first size as a separate argument. The placeholder
            # of an argument x is named `L_x_`.
            which = [
                None if isinstance(example, torch.SymInt) else names.index(str(place)[2:-1])
                for place, example in zip(places, examples, strict=True)
            ]
            self._run = lambda views: compiled(*(views[0].shape[0] if i is None else views[i] for i in which))
            # dynamo calls the result. It does nothing, because a failure of compiled code would count as one of compilation.
            return lambda *_: ()

        if not _COMPILING.acquire(blocking=False):
            raise NotCompiled
        try:
            # Another thread may have compiled meanwhile.
            if self._run is None and not self._failed:
                for view in views:
                    torch._dynamo.mark_dynamic(view, 0)
                with torch._C.DisableTorchFunction():
                    torch.compile(self._function, backend=backend, fullgraph=True, dynamic=False)(*views)
        except NotCompiled:
            raise
        except Exception:
            self._failed = True  # set before the lock is released, so that no other thread compiles
            raise
        finally:
            _COMPILING.release()
        if self._run is None:
            raise NotCompiled
        return self._run


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" and tensor.is_contiguous()


def _observed() -> bool:
    """Return whether a torch mode or transform observes operations. Compiled operations would escape it.

    The result is also True if this version of torch gives no access to its modes.
    """
    try:
        return (
            torch._C._len_torch_dispatch_stack() > 0
            or torch._C._functorch.peek_interpreter_stack() is not None
            or torch._C._is_tracing()
        )
    except AttributeError:
        return True


@cache
def _has_vectors() -> bool:
    """Return whether inductor vectorises on this machine.

    AVX also implies little-endian byte order. Compiled functions that handle two values as one word need this order.
    """
    return sys.platform != "win32" and torch.backends.cpu.get_cpu_capability().startswith("AVX")


def _view(tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Return a plain tensor of this dtype and shape over the beginning of the memory of `tensor`.

    The result does not depend on the mode in which `tensor` was made.
    """
    first = tensor.storage_offset() * tensor.element_size()
    if first % dtype.itemsize:
        raise NotCompiled
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return torch.empty(0, dtype=dtype, device="cpu").set_(
        tensor.untyped_storage(), first // dtype.itemsize, tuple(shape), strides
    )
