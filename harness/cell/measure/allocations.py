"""Memory of CPU tensors, to the byte: those that exist, and every allocation while a function runs."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.profiler import kineto_available
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from harness.cell.measure.memory import tensor_bytes


def peak_while(run: Callable[[], object]) -> int | None:
    """Return the most bytes of CPU tensors that exist at one time while `run` runs, those from before it included.

    The process's own peak (VmHWM) differs by megabytes between equal runs; this is the same to the byte, since it adds up
    the sizes of requests to torch's allocator. None if torch was built without its profiler.

    Not counted: tensors that imports made (the garbage collector does not list them, see `harness/runner/worker.py`),
    allocations of other libraries and of Python threads, and earlier tensors without a storage of their own (sparse ones,
    and those that a transform such as vmap left behind). An earlier tensor that `run` frees counts to the end.
    """
    if not kineto_available():
        return None
    # Else it writes two lines to stderr for every profile; it reads this when it is first used.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    before = tensor_bytes(_existing())
    collects = gc.isenabled()
    gc.disable()  # its moments depend on all objects there are, and garbage may hold tensors
    try:
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            run()
    finally:
        if collects:
            gc.enable()
    results: Any = profile.kineto_results
    return before + max(accumulate(_changes(results.events()), initial=0))


def _existing() -> list[Tensor]:
    """List the tensors in CPU memory; instead of a wrapper, the tensors inside it."""
    gc.collect()
    # `isinstance` would load lazy modules and proxies.
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
    return [
        t
        for t in tensors
        if has_storage(t)
        and not is_traceable_wrapper_subclass(t)
        and t.untyped_storage().device.type == "cpu"  # a compiler's fake tensors have the device `cpu`
    ]


def has_storage(tensor: Tensor) -> bool:
    """Return whether a tensor has a storage: not one of an unused lazy module, a sparse one, or one inside vmap."""
    return not is_lazy(tensor) and torch._C._has_storage(tensor)


def _changes(events: list[Any]) -> Iterator[int]:
    """Yield the bytes of every allocation, negative for a release, in the order of time."""
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            yield event.nbytes()
