"""Read energy in joules from the counters of a driver or the kernel. Unknown energy is None, never 0 or an estimate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.cell.measure.gpu import NvmlGpu

LEAST_S = 2.0
"""Shortest window of time that is measured, in seconds. NVML updates its counter only every 20 to 100 ms, so the energy
of a shorter window may be wrong by many per cent."""
RAPL = Path("/sys/class/powercap")
_MOST_W = 1000.0
"""Upper bound of the power of a CPU package, in watts. RAPL's counter starts again at zero after about 262 kJ. A window
of time is not measured if, at this power, the counter could start again twice in the window."""


@dataclass
class Counter:
    """A source of energy readings: one GPU, or all CPU packages (Intel and AMD)."""

    source: str
    """Name of the source: `nvml` or `rapl`."""
    read: Callable[[], list[float] | None]
    """Function that returns the counted joules of each device. It returns None if a counter cannot be read."""
    maxima: list[float]
    """For each device, the joules at which its counter starts again at zero; infinity if it never does."""

    def between(self, before: list[float], after: list[float], seconds: float) -> float | None:
        """Return the joules that all devices used between two readings.

        seconds: time between the readings. Return None if a counter may have started again at zero twice, or was reset.
        """
        if seconds * _MOST_W > min(self.maxima):
            return None
        total = sum((end - start) % most for start, end, most in zip(before, after, self.maxima, strict=True))
        return total if math.isfinite(total) else None


@dataclass
class EnergyMeter:
    """A meter of the energy that a GPU or the CPU packages use in a window of time."""

    counter: Counter | None
    because: str = ""
    """Reason why there is no counter; empty if there is one."""

    @property
    def source(self) -> str:
        """The name of the counter; empty if there is none."""
        return self.counter.source if self.counter else ""

    def start(self) -> None:
        """Begin a window of time with a reading of the counter."""
        self._before = self.counter.read() if self.counter else None
        self._began = time.monotonic()

    def joules(self) -> float | None:
        """Return the joules used since `start`, or None if they are unknown.

        They are unknown if no counter can be read, if the counter may have been reset, or in the first LEAST_S seconds.
        """
        seconds = time.monotonic() - self._began
        if self.counter is None or self._before is None or seconds < LEAST_S:
            return None
        after = self.counter.read()
        return None if after is None else self.counter.between(self._before, after, seconds)


def meter(gpu: NvmlGpu | None, because: str = "", *, cuda: bool = False, root: Path = RAPL) -> EnergyMeter:
    """Return a meter of the energy of `gpu` if `cuda` is true, otherwise of the CPU packages.

    because: the reason why `gpu` is None. root: the folder with the kernel's counters.
    """
    if cuda:
        if gpu is None:
            return EnergyMeter(None, because)
        if gpu.energy() is None:
            return EnergyMeter(None, "this GPU's driver counts no energy")
        return EnergyMeter(Counter("nvml", lambda: None if (spent := gpu.energy()) is None else [spent], [math.inf]))
    packages = [zone for zone in sorted(root.glob("intel-rapl:*")) if _is_package(zone)]
    if not packages:
        return EnergyMeter(None, f"this machine shows no energy counter of its CPU ({root})")
    counters, maxima = ([zone / name for zone in packages] for name in ("energy_uj", "max_energy_range_uj"))
    limits = _joules(maxima)
    if limits is None or _joules(counters) is None:
        return EnergyMeter(None, f"{counters[0]} may not be read; its owner can change its mode")
    return EnergyMeter(Counter("rapl", lambda: _joules(counters), limits))


def _is_package(zone: Path) -> bool:
    """Return whether a folder with one of the kernel's energy counters belongs to a whole CPU package.

    Other folders belong to a part of a package (`intel-rapl:0:0`), or to the platform (`psys`).
    """
    try:
        return (zone / "name").read_text().startswith("package")
    except OSError:
        return False


def _joules(files: Sequence[Path]) -> list[float] | None:
    """Read files that each hold a number of microjoules. Return joules, or None if a file cannot be read."""
    try:
        return [int(file.read_text()) / 1e6 for file in files]
    except (OSError, ValueError):
        return None
