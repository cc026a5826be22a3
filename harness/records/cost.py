"""Costs in a Cell's Record other than time and tensors: files, energy, the state of a GPU.

A value that was not measured is None, never 0.
"""

from __future__ import annotations

from typing import Literal

from harness.records.base_model import Bytes, FrozenModel


class Checkpoint(FrozenModel):
    """Sizes of the files that a user would save, in safetensors format."""

    adapter_file_B: Bytes | None = None
    """Size of one file with all trained tensors: the adapter and the head. Tensors that can be computed again are left
    out, such as VeRA's projections and PiSSA's residual. The file is written, measured and removed. None if there is
    neither adapter nor head; `because` has the reason."""
    head_B: Bytes = 0
    """Size of the head's tensors, which are a part of the adapter file."""
    model_B: Bytes
    """Size of a file with the whole merged or fully trained model. Weights are unpacked and in the Cell's dtype, and
    each tied weight counts once. The sizes of the tensors are summed; no such file is written."""
    because: str = ""
    """Reason why there is no adapter file."""


class Energy(FrozenModel):
    """Source of the energy values in `Phase.energy_J`."""

    source: str = ""
    """Energy counter: `nvml` for one GPU with its memory, or `rapl` for all CPU packages and all processes of the
    machine. Empty if no energy was measured."""
    because: str = ""
    """Reason why no energy was measured."""


Throttle = Literal[
    "idle", "application-clocks", "power-cap", "hardware-slowdown", "sync-boost", "software-thermal", "hardware-thermal",
    "power-brake", "display-clocks", "other",
]  # fmt: skip


class GpuState(FrozenModel):
    """State of a GPU at one moment, from its driver. A value that the driver does not report is None."""

    uuid: str
    """UUID of the GPU."""
    sm_clock_Hz: int | None = None
    """Clock rate of the streaming multiprocessors."""
    memory_clock_Hz: int | None = None
    """Clock rate of the memory."""
    power_W: float | None = None
    """Power draw."""
    temperature_C: float | None = None
    """Temperature."""
    throttle: list[Throttle] | None = None
    """Reasons for reduced clocks; `idle` and an empty list are harmless."""


class GpuPhase(FrozenModel):
    """State and memory of a GPU during one phase of a Cell. The peak of allocated bytes is in `Phase.peak_memory_B`."""

    start: GpuState | None = None
    """State at the start of the phase."""
    end: GpuState | None = None
    """State at the end of the phase."""
    reserved_B: Bytes | None = None
    """Largest memory that torch's allocator held, whether used or not."""
    driver_B: Bytes | None = None
    """Largest memory in use on the whole device, as the driver counts it. This includes contexts, other libraries and
    other processes. It is sampled ten times a second, so a short peak may be missed."""
    alloc_retries: int | None = None
    """Number of times that the allocator freed its cache and tried again."""
    ooms: int | None = None
    """Number of failed allocations. An allocation counts even if its error was caught."""
