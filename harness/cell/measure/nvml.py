"""Read the state of an NVIDIA GPU by NVML, through `nvidia-ml-py`, which need not be installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from harness.records.cost import GpuState, Throttle

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
"""NVML's bits, `nvmlClocksEventReason*`."""


class NvmlGpu:
    """One GPU. A value that its driver does not offer, or fails to return, is None."""

    def __init__(self, nvml: Any, handle: Any, uuid: str) -> None:
        self._nvml, self._handle, self.uuid = nvml, handle, uuid

    def energy(self) -> float | None:
        """Return joules since the driver was loaded; supported since Volta."""
        spent = self._read(self._nvml.nvmlDeviceGetTotalEnergyConsumption)
        return None if spent is None else spent / 1000  # from mJ

    def memory(self) -> int | None:
        """Return bytes in use on the whole device, by all processes."""
        found = self._read(self._nvml.nvmlDeviceGetMemoryInfo)
        return None if found is None else int(found.used)

    def state(self) -> GpuState:
        """Return clocks, power, temperature, and why the clocks are not higher."""
        nvml = self._nvml
        clocks = [self._read(nvml.nvmlDeviceGetClockInfo, which) for which in (nvml.NVML_CLOCK_SM, nvml.NVML_CLOCK_MEM)]
        power = self._read(nvml.nvmlDeviceGetPowerUsage)
        degrees = self._read(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU)
        # The function has another name since CUDA 12.
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
    """Return the GPU of this UUID (`GPU-...`), or the reason why NVML cannot read it."""
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
