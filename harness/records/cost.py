"""What a Cell costs beside its time and its tensors, as its Record holds it: files, energy, the state of a GPU.

None always means "not measured", never 0.
"""

from __future__ import annotations

from typing import Literal

from harness.records.base_model import Bytes, FrozenModel

AT_ONCE = "Cells ran at once"
"""Stands in the Record's note of a Cell that had others beside it on its machine."""


class Checkpoint(FrozenModel):
    """What a user would save. Both sizes are of safetensors."""

    adapter_file_B: Bytes | None = None
    """The adapter and the head in one file: all that trains, and nothing that can be made again (VeRA's projections,
    PiSSA's residual). Written to a disk, looked at, removed. None where there is neither adapter nor head, see `because`."""
    head_B: Bytes = 0
    """Of that, the tensors of the head."""
    model_B: Bytes
    """The tensors of the whole model, as it is saved when the adapter is merged or everything was trained: unpacked, in the
    Cell's dtype, tied weights once. Summed over the tensors; no such file was written."""
    because: str = ""
    """Why there is no size of a file, if there is none."""


class Energy(FrozenModel):
    """Where the joules of the phases come from."""

    source: str = ""
    """`nvml` (one GPU, its memory included) or `rapl` (all CPU packages of the machine, whoever used them)."""
    because: str = ""
    """Why there are none, if there are none."""


Throttle = Literal[
    "idle", "application-clocks", "power-cap", "hardware-slowdown", "sync-boost", "software-thermal", "hardware-thermal",
    "power-brake", "display-clocks", "other",
]  # fmt: skip


class GpuState(FrozenModel):
    """A GPU at one moment, by its driver. None: the driver does not say."""

    uuid: str
    sm_clock_Hz: int | None = None
    memory_clock_Hz: int | None = None
    power_W: float | None = None
    temperature_C: float | None = None
    throttle: list[Throttle] | None = None
    """Why its clocks are lower than they could be; `idle` and an empty list are no cause for worry."""


class GpuPhase(FrozenModel):
    """A GPU during one phase. The peak of allocated bytes is the phase's `peak_memory_B`."""

    start: GpuState | None = None
    end: GpuState | None = None
    reserved_B: Bytes | None = None
    """Highest memory that torch's allocator held, used or not."""
    driver_B: Bytes | None = None
    """Highest memory in use on the whole device as its driver counts: contexts, other libraries, other processes too. Looked
    at ten times a second, so a short peak may be missed."""
    alloc_retries: int | None = None
    """How often the allocator had to give back what it held and ask again."""
    ooms: int | None = None
    """Allocations that failed, also those that somebody caught."""
