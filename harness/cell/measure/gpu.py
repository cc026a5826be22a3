"""A GPU during a phase: numbers of the allocator and the driver, and the GPU's state at both edges."""

from __future__ import annotations

import threading
from typing import Any

import torch

from harness.cell.measure import nvml
from harness.cell.measure.nvml import NvmlGpu
from harness.records.cost import GpuPhase

_SAMPLE_S = 0.1


class GpuWatch:
    """Watches one GPU, one phase at a time. gpu: None if NVML is not available; torch's numbers do not need it."""

    def __init__(self, device: torch.device, gpu: NvmlGpu | None) -> None:
        self.device, self.gpu = device, gpu
        self._driver = 0
        if gpu is not None:
            threading.Thread(target=self._sample_on, daemon=True).start()

    def begin(self) -> None:
        """Begin a phase; the peak of torch's allocator is reset by PeakMeter."""
        self._before = self._counts()
        self._start = self.gpu.state() if self.gpu else None
        self._driver = 0
        self._sample()

    def end(self) -> GpuPhase:
        """Return the numbers since `begin`."""
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


def find(device: torch.device) -> tuple[NvmlGpu | None, str]:
    """Return the NVML handle of torch's device, or the reason for its absence."""
    return nvml.find(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
