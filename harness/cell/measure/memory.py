"""Measure the peak memory of a phase, the memory of existing tensors, and the tensors that a function allocates."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.profiler import kineto_available
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from harness.methods.checksums import tensors_in

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_SAMPLE_S = 0.02


class PeakMeter:
    """A meter of the peak memory since the last `reset`, in bytes.

    On a GPU, it measures the bytes that torch has allocated. On a CPU under Linux, it reads VmHWM, the peak of the
    process, which the kernel can reset. (ru_maxrss would include the peak of the parent process.) On other systems, a
    thread samples the resident size, so short peaks are missed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sampled = 0
        if device.type == "cuda":
            self.source = "cuda allocated"
        elif self._can_reset():
            self.source = "VmHWM"
        else:
            self.source = "sampled"
            threading.Thread(target=self._sample, daemon=True).start()

    def reset(self) -> None:
        """Release freed memory to the system, and start a new peak."""
        gc.collect()
        if self.source == "cuda allocated":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.source == "VmHWM":
            _trim()
            _CLEAR.write_text("5")
        else:
            self._sampled = self.now()

    def synchronize(self) -> None:
        """Wait until the GPU has done all queued work, so that the work counts for the phase that queued it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak(self) -> int:
        """Return the peak since `reset`, in bytes."""
        if self.source == "cuda allocated":
            return int(torch.cuda.max_memory_allocated(self.device))
        return _status_bytes("VmHWM") if self.source == "VmHWM" else max(self._sampled, self.now())

    def now(self) -> int:
        """Return the memory in use, in bytes."""
        if self.source == "cuda allocated":
            return int(torch.cuda.memory_allocated(self.device))
        if self.source == "VmHWM":
            return _status_bytes("VmRSS")
        import psutil

        return int(psutil.Process().memory_info().rss)

    @staticmethod
    def _can_reset() -> bool:
        if not (sys.platform == "linux" and _STATUS.exists()):
            return False
        try:
            _CLEAR.write_text("5")
        except OSError:
            return False
        return True

    def _sample(self) -> None:
        while True:
            self._sampled = max(self._sampled, self.now())
            threading.Event().wait(_SAMPLE_S)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages of `tensors`, without those on the meta device. A shared storage counts once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type != "meta"
    }
    return sum(storages.values())


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages of `tensors`, including those on the meta device. A shared storage counts once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def model_tensors(model: torch.nn.Module) -> list[Tensor]:
    """List a model's parameters and buffers, and the scales of its quantised weights."""
    found: list[Tensor] = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        found += tensors_in(getattr(parameter, "quant_state", None))
    return found


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """List the tensors in an optimizer's state, including those inside other objects.

    galore-torch, for example, keeps a projector object with tensors in the state.
    """
    return [t for state in optimizer.state.values() for value in state.values() for t in tensors_in(value)]


def _status_bytes(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in {_STATUS}")


def _trim() -> None:
    """Return free pages of the C heap to the system, so that the next peak does not include them. Needs glibc."""
    libc: Any = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def peak_while(run: Callable[[], object]) -> int | None:
    """Call `run`. Return the peak bytes of all CPU tensors during the call, or None if torch has no profiler.

    The peak includes tensors that existed before the call. Equal runs give the same peak, to the byte, because the peak
    adds up the requests to torch's allocator. VmHWM, the peak of the process, would differ by megabytes.

    Some memory is not included. Tensors that were made during imports are missing, because the garbage collector does
    not list them (see `harness/runner/worker.py`). Allocations by other libraries and by Python threads are missing.
    Earlier tensors without a storage are missing: sparse tensors, and wrappers that vmap left. If `run` frees an
    earlier tensor, this tensor is still included until the end.
    """
    if not kineto_available():
        return None
    # Without this variable, the profiler writes two lines to stderr each time. It reads the variable at its first use.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    before = tensor_bytes(_existing())
    collects = gc.isenabled()
    gc.disable()  # garbage may hold tensors, and the time of a collection depends on all objects
    try:
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            run()
    finally:
        if collects:
            gc.enable()
    results: Any = profile.kineto_results
    events: list[Any] = sorted(results.events(), key=lambda event: event.start_ns())
    # The size of a release is negative.
    changes = (int(event.nbytes()) for event in events if event.name() == "[memory]")
    return before + max(accumulate(changes, initial=0))


def _existing() -> list[Tensor]:
    """List the tensors in CPU memory. For a tensor that wraps other tensors, only the inner tensors are listed."""
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
    """Return whether a tensor has a storage.

    A tensor has none if it is sparse, belongs to an unused lazy module, or is used inside vmap.
    """
    return not is_lazy(tensor) and torch._C._has_storage(tensor)
