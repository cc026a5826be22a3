"""Read the state of an NVIDIA GPU through NVML, and its memory use from torch's allocator and from the driver."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any

import torch

from harness.records.cost import GpuPhase, GpuState, Throttle

_MHZ = 1_000_000
_REASONS: dict[int, Throttle] = {
    0x001: "idle",
    0x002: "application-clocks",
    0x004: "power-cap",
    0x008: "hardware-slowdown",
    0x010: "sync-boost",
    0x020: "software-thermal",
    0x040: "hardware-thermal",
    0x080: "power-brake",
    0x100: "display-clocks",
}
"""NVML's bit for a reason of reduced clocks (`nvmlClocksEventReason*`) -> the name of this reason in a Record."""
_SAMPLE_S = 0.1


class NvmlGpu:
    """One GPU, read through the optional package `nvidia-ml-py`. A value that the driver does not return is None."""

    def __init__(self, nvml: Any, handle: Any, uuid: str) -> None:
        self._nvml, self._handle, self.uuid = nvml, handle, uuid

    def energy(self) -> float | None:
        """Return the joules that the GPU has used since its driver was loaded. None for GPUs older than Volta."""
        spent = self._read(self._nvml.nvmlDeviceGetTotalEnergyConsumption)
        return None if spent is None else spent / 1000  # from mJ

    def memory(self) -> int | None:
        """Return the bytes in use on the whole device, by all processes."""
        found = self._read(self._nvml.nvmlDeviceGetMemoryInfo)
        return None if found is None else int(found.used)

    def state(self) -> GpuState:
        """Return clocks, power, temperature, and the reasons for reduced clocks."""
        nvml = self._nvml
        clocks = [self._read(nvml.nvmlDeviceGetClockInfo, which) for which in (nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM)]
        power = self._read(nvml.nvmlDeviceGetPowerUsage)
        degrees = self._read(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU)
        # CUDA 12 renamed the function.
        events = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        reasons = self._read(events or nvml.nvmlDeviceGetCurrentClocksThrottleReasons)
        sm, memory = (None if clock is None else int(clock) * _MHZ for clock in clocks)
        return GpuState(
            uuid=self.uuid,
            sm_clock_Hz=sm,
            memory_clock_Hz=memory,
            power_W=None if power is None else power / 1000,  # from mW
            temperature_C=None if degrees is None else float(degrees),
            throttle=None if reasons is None else _named(int(reasons)),
        )

    def _read(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(self._handle, *arguments)
        except self._nvml.NVMLError:
            return None


def _named(bits: int) -> list[Throttle]:
    known = [word for bit, word in _REASONS.items() if bits & bit]
    return [*known, "other"] if bits & ~sum(_REASONS) else known


def find(uuid: str) -> tuple[NvmlGpu | None, str]:
    """Return the GPU with this UUID (`GPU-...`), or the reason why NVML cannot read it.

    The result is a pair: the GPU and an empty text, or None and the reason.
    """
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None, "nvidia-ml-py, which reads the driver, is not installed; pip install nvidia-ml-py"
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
    except nvml.NVMLError as error:
        return None, f"the GPU's driver refuses: {error}"
    return NvmlGpu(nvml, handle, uuid), ""


class GpuWatch:
    """A reader of the state and the memory of a GPU, one phase at a time.

    gpu: None if NVML cannot be used. Then only torch's numbers are read.
    """

    def __init__(self, device: torch.device, gpu: NvmlGpu | None) -> None:
        self.device, self.gpu = device, gpu
        self._driver = 0
        if gpu is not None:
            threading.Thread(target=self._sample_on, daemon=True).start()

    def begin(self) -> None:
        """Begin a phase. Call `PeakMeter.reset` before, so that the peak belongs to this phase alone."""
        self._before = self._counts()
        self._start = self.gpu.state() if self.gpu else None
        self._driver = 0
        self._sample()

    def end(self) -> GpuPhase:
        """End the phase. Return its memory, and the state of the GPU at its beginning and at its end."""
        self._sample()
        now = self._counts()
        return GpuPhase(
            start=self._start,
            end=self.gpu.state() if self.gpu else None,
            reserved_B=int(torch.cuda.max_memory_reserved(self.device)),
            driver_B=self._driver or None,
            alloc_retries=now["num_alloc_retries"] - self._before["num_alloc_retries"],
            ooms=now["num_ooms"] - self._before["num_ooms"],
        )

    def _counts(self) -> dict[str, int]:
        stats: dict[str, Any] = torch.cuda.memory_stats(self.device)
        return {name: int(stats.get(name, 0)) for name in ("num_alloc_retries", "num_ooms")}

    def _sample(self) -> None:
        used = self.gpu.memory() if self.gpu else None
        self._driver = max(self._driver, used or 0)

    def _sample_on(self) -> None:
        while True:
            self._sample()
            threading.Event().wait(_SAMPLE_S)
