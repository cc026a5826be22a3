"""Functions of CPU tensors by torch.compile: the one place that decides when to compile, when to run, and what if it fails.

Compiling costs seconds, so it waits for the first call that is large, and happens once for each `Compiled`, whatever the
sizes, the threads and the modes (inference, autocast, default device) of later calls. One thread compiles; what others call
meanwhile, or would compile too, runs uncompiled. Measured for NF4 on two cores: 11 s for the first function and 1.6 s for
each further one with inductor's cache on disk empty; 3.5 s, which is the import of inductor, and 0.2 s with it warm.
PEFT_HARNESS_COMPILE=0 in the environment switches it off, and PEFT_HARNESS_COMPILE=1 compiles for smaller tensors too.
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
"""Values from which calls are compiled: who has one such tensor has more of them. With fewer, what is gained is less than
what threads lose that wait for each other on a busy machine."""
_SMALL = 1 << 16
"""Values from which, if that is asked for: below, a call takes longer than eager torch."""

_COMPILING = Lock()
"""Held by who compiles. One for all functions, since dynamo has one, too, for which a thread would wait."""

_OPTIONS: dict[str, Any] = {
    # Otherwise the number of threads of the first call is part of the code.
    "cpp.dynamic_threads": True,
    # Otherwise what has more than 30 operations goes to memory and back midway, which takes three times as long.
    "realize_opcount_threshold": 1 << 20,
    "realize_reads_threshold": 1 << 20,
}


class NotCompiled(Exception):  # noqa: N818 - it is no error
    """Raised by `only_compiled`."""


def only_compiled() -> None:
    """Raise NotCompiled where torch runs a function uncompiled that is meant to be compiled.

    torch.compile does so without a word under set_stance("force_eager") or TORCH_COMPILE_DISABLE=1.
    """
    if not torch.compiler.is_compiling():
        raise NotCompiled


class Compiled:
    """A function that writes to some of its tensors, and returns nothing, compiled once.

    function: begins with `only_compiled()`. Its tensors are contiguous; they have one first size, which differs from call to
    call; their other sizes and their dtypes do not. What it computes must not depend on torch's default dtype or device.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        if not isinstance(function, FunctionType):
            raise TypeError(f"needs a function written in Python, got {function!r}")
        # torch.compile allows eight results for a code object, which all closures of one function share.
        code = function.__code__.replace()
        self._function = FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)
        self._run: Callable[[Sequence[Tensor]], object] | None = None
        self._failed = False

    def wanted(self, values: int, *tensors: Tensor) -> bool:
        """Return whether to call this for so many values, which `tensors` hold.

        They must be plain memory on a CPU with wide vectors, and nobody may look at what torch does with them.
        """
        asked = os.environ.get("PEFT_HARNESS_COMPILE")
        if asked == "0" or values < (_SMALL if asked == "1" else LARGE):
            return False
        if self._failed or torch.compiler.is_compiling() or _watched():
            return False
        return _vectors() and all(map(_plain, tensors))

    def __call__(self, *tensors: tuple[Tensor, torch.dtype, Sequence[int]], out: Sequence[Tensor]) -> bool:
        """Run the function on views of `tensors`, and return whether it ran; if not, `out` may hold anything.

        tensors: each with the dtype and the shape to view the beginning of its memory in. out: those that are written to.
        Whatever happens in the compiler, or in what it made, is one warning, no error.
        """
        failure, hint = "did not compile", "A C++ compiler with OpenMP (g++) mends it; "
        try:
            with torch.inference_mode(False), torch.no_grad():
                views = [_view(*tensor) for tensor in tensors]
                torch.get_num_threads()  # tells OpenMP, too, in a thread that is new
                run = self._run or self._compile(views)
                failure, hint = "compiled, and then failed", ""
                run(views)
        except NotCompiled:
            return False
        except Exception as error:  # noqa: BLE001 - a compiler fails in many ways, and there is another way for each
            self._failed = True
            warnings.warn(
                f"harness.kernels.torch.support.compiled: {self._function.__name__} {failure}; from now on it runs uncompiled, several "
                f"times slower: {type(error).__name__}: {str(error).strip()[:300]}. {hint}"
                "PEFT_HARNESS_COMPILE=0 compiles nothing and says nothing",
                RuntimeWarning,
                stacklevel=3,
            )
            return False
        for tensor in out:
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)  # the view has a version of its own
        return True

    def _compile(self, views: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], object]:
        """Return what inductor makes of the function, and keep it.

        It is then called without dynamo's guards, which would compile anew for another number of threads, for autocast and
        for other settings that do not matter here.
        """
        names = self._function.__code__.co_varnames[: len(views)]

        def keep(graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
            made: Callable[..., Any] = torch._inductor.compile(graph, examples, options=_OPTIONS)
            places = [node.target for node in graph.graph.find_nodes(op="placeholder")]
            # The graph takes the tensors in the order of their first use, and their first size by itself.
            which = [
                None if isinstance(example, torch.SymInt) else names.index(str(place)[2:-1])  # L_name_
                for place, example in zip(places, examples, strict=True)
            ]
            self._run = lambda given: made(*(given[0].shape[0] if i is None else given[i] for i in which))
            return lambda *_: ()  # dynamo would run it here, where what fails looks like the compiler's fault

        if not _COMPILING.acquire(blocking=False):
            raise NotCompiled
        try:
            # Another thread may have been here since this one looked.
            if self._run is None and not self._failed:
                for view in views:
                    torch._dynamo.mark_dynamic(view, 0)
                with torch._C.DisableTorchFunction():
                    torch.compile(self._function, backend=keep, fullgraph=True, dynamic=False)(*views)
        except NotCompiled:
            raise
        except Exception:
            self._failed = True  # before another thread has its turn
            raise
        finally:
            _COMPILING.release()
        if self._run is None:
            raise NotCompiled
        return self._run


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" and tensor.is_contiguous()


def _watched() -> bool:
    """Whether a mode or a transform sees every operation, and would miss those that are compiled.

    Also where this torch does not tell: these names are not promised.
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
def _vectors() -> bool:
    """Whether inductor has vectors here for which this was measured; they are also little-endian, which pairs rely on."""
    return sys.platform != "win32" and torch.backends.cpu.get_cpu_capability().startswith("AVX")


def _view(tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Return the first values of a tensor's memory as a plain tensor, whatever mode made it: one kind for the compiler."""
    first = tensor.storage_offset() * tensor.element_size()
    if first % dtype.itemsize:
        raise NotCompiled
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return torch.empty(0, dtype=dtype, device="cpu").set_(
        tensor.untyped_storage(), first // dtype.itemsize, tuple(shape), strides
    )
