"""Find out whether torch can use a GPU, and the GPU's name. This module imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UsageError
from harness.process.worker_pool import WorkerPool
from harness.records import environment

_PROBE_S = 120.0
"""Seconds after which the process that asks torch is killed if it has not answered."""
NO_GPU = "no GPU"


@dataclass(frozen=True)
class Gpu:
    """The GPU that torch uses by default, or the reason why there is none."""

    missing: str = ""
    """Reason why no GPU can be used. Empty if one can."""
    name: str = ""
    """Name of the GPU or of its MIG part, as torch returns it. Kernels and tables of crossovers use this name, too."""
    note: str = ""
    """Error of nvidia-smi, or empty if there is none. torch works without nvidia-smi."""


def find_gpu() -> Gpu:
    """Return the GPU that torch can use, or the reason why there is none.

    A separate process asks torch, because other sources may be wrong. torch may be built without CUDA although the
    driver shows a GPU. A container may have a GPU, but no working nvidia-smi.
    """
    found, note = environment.gpus(), environment.gpu_error()
    if not found and not any(Path(path).exists() for path in ("/proc/driver/nvidia", "/dev/nvidiactl")):
        return Gpu(f"{NO_GPU}: {note}" if note else NO_GPU)
    first, *_ = WorkerPool().events("harness.bench.gpu_probe", {}, _PROBE_S)
    why = first.get("unusable", first.get("died"))
    return Gpu(f"{NO_GPU}: the driver is there, but {why}") if why else Gpu(name=first["card"], note=note)


def no_gpu() -> str:
    """Return the reason why no GPU can be used, or an empty string if one can."""
    return find_gpu().missing


def refuse_interpreter() -> None:
    """Raise UsageError if Triton's interpreter is on. Kernels would run on the CPU, and times would mean nothing."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        what = "Triton's interpreter is on: times would be meaningless"
        raise UsageError(what, where="TRITON_INTERPRET", hint="unset it")
