"""What tensors take in a CPU's memory, to the byte: those that exist, and every allocation while something runs."""

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


def most_while(run: Callable[[], object]) -> int | None:
    """Return the most bytes of CPU tensors that exist at one time while `run` runs, those from before it included.

    The process's own peak (VmHWM) differs by megabytes between equal runs; this is the same to the byte, since it adds up
    the sizes that torch's allocator was asked for. None of a torch that was built without its profiler.

    Not in it: tensors that imports made (they are out of the collector's sight, see `harness/runner/worker.py`), what other
    libraries allocate by themselves, what threads of Python's allocate, and tensors from before that have no storage of
    their own (sparse ones, and those that a transform such as vmap left behind). A tensor from before that `run` frees
    counts to the end.
    """
    if not kineto_available():
        return None
    # Else it writes two lines to stderr for every profile; it looks at this when it is first used.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    before = tensor_bytes(_existing())
    collects = gc.isenabled()
    gc.disable()  # when it strikes depends on all objects there are, and garbage may hold tensors
    try:
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            run()
    finally:
        if collects:
            gc.enable()
    results: Any = profile.kineto_results
    return before + max(accumulate(_changes(results.events()), initial=0))


def _existing() -> list[Tensor]:
    """List the tensors whose memory is a CPU's; of one that stands for others (a wrapper), those."""
    gc.collect()
    # `isinstance` would ask lazy modules and proxies what they are, and so load them.
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
    return [
        t
        for t in tensors
        if has_storage(t)
        and not is_traceable_wrapper_subclass(t)
        and t.untyped_storage().device.type == "cpu"  # a compiler's fake tensors say `cpu` of themselves
    ]


def has_storage(tensor: Tensor) -> bool:
    """Say whether a tensor can be asked for its storage: not one of a lazy module that no batch went through yet, a sparse
    one, or one inside a transform such as vmap."""
    return not is_lazy(tensor) and torch._C._has_storage(tensor)


def _changes(events: list[Any]) -> Iterator[int]:
    """Yield the bytes of every allocation, and less than 0 of every release, in the order of time."""
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            yield event.nbytes()
