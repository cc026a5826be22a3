"""Costs in a Cell's Record other than time and tensors: files, energy, the state of a GPU.

A value that was not measured is None, never 0.
"""

from __future__ import annotations

from typing import Literal

from harness.records.base_model import Bytes, FrozenModel


class Checkpoint(FrozenModel):
    """Sizes of the files that a user would save, in safetensors format."""

    adapter_file_B: Bytes | None = None
    """Size of one file with the adapter and the head: all tensors that train, without those that can be computed
    again (VeRA's projections, PiSSA's residual). The file is written, measured and removed. None if there is neither
    adapter nor head, see `because`."""
    head_B: Bytes = 0
    """Part of the adapter file: the tensors of the head."""
    model_B: Bytes
    """Size of a file with the whole model, merged or fully trained: unpacked, in the Cell's dtype, each tied weight
    once. The sizes of the tensors are summed; no such file is written."""
    because: str = ""
    """Reason for no adapter file."""


class Energy(FrozenModel):
    """Source of the energy of the phases."""

    source: str = ""
    """Counter: `nvml` (one GPU, its memory included) or `rapl` (all CPU packages of the machine, all processes)."""
    because: str = ""
    """Reason for no energy."""


Throttle = Literal[
    "idle", "application-clocks", "power-cap", "hardware-slowdown", "sync-boost", "software-thermal", "hardware-thermal",
    "power-brake", "display-clocks", "other",
]  # fmt: skip


class GpuState(FrozenModel):
    """State of a GPU at one moment, from its driver. A value that the driver does not report is None."""

    uuid: str
    """UUID of the GPU."""
    sm_clock_Hz: int | None = None
    """Clock of the streaming multiprocessors."""
    memory_clock_Hz: int | None = None
    """Clock of the memory."""
    power_W: float | None = None
    """Power draw."""
    temperature_C: float | None = None
    """Temperature."""
    throttle: list[Throttle] | None = None
    """Reasons for reduced clocks; `idle` and an empty list are harmless."""


class GpuPhase(FrozenModel):
    """A GPU during one phase. The peak of allocated bytes is the phase's `peak_memory_B`."""

    start: GpuState | None = None
    """State at the start of the phase."""
    end: GpuState | None = None
    """State at the end of the phase."""
    reserved_B: Bytes | None = None
    """Highest memory that torch's allocator held, used or not."""
    driver_B: Bytes | None = None
    """Highest memory in use on the whole device by its driver's count, with contexts, other libraries and other
    processes. It is sampled ten times a second, so a short peak may be missed."""
    alloc_retries: int | None = None
    """Number of times that the allocator freed its cache and tried again."""
    ooms: int | None = None
    """Number of failed allocations, also of those whose error was caught."""
