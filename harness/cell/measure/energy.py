"""Energy in joules, if a driver or the kernel counts it. Never estimated; None if unknown, never 0."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from harness.cell.measure.nvml import NvmlGpu

LEAST_S = 2.0
"""Shortest window. NVML's counter moves every 20 to 100 ms: a shorter one may be wrong by many per cent."""
RAPL = Path("/sys/class/powercap")
_MOST_W = 1000.0
"""No package draws more. A counter of RAPL wraps at some 262 kJ; after two wraps their number is unknown."""


class Counter(Protocol):
    """A source of energy readings."""

    source: str

    def now(self) -> list[float] | None:
        """Return the readings of its counters in joules, or None if they cannot be read."""

    def between(self, before: list[float], after: list[float], seconds: float) -> float | None:
        """Return joules from one reading to another, or None if these do not determine it."""


@dataclass
class NvmlCounter:
    """The counter of one GPU; it restarts only with the driver."""

    gpu: NvmlGpu
    source: str = "nvml"

    def now(self) -> list[float] | None:
        """Return joules since the driver was loaded."""
        spent = self.gpu.energy()
        return None if spent is None else [spent]

    def between(self, before: list[float], after: list[float], seconds: float) -> float | None:
        """Return the difference; None if the driver was reloaded."""
        return after[0] - before[0] if after[0] >= before[0] else None


@dataclass
class RaplCounter:
    """The counters of the CPU packages (Intel's and AMD's); each wraps at its own maximum."""

    packages: list[Path]
    source: str = "rapl"

    def now(self) -> list[float] | None:
        """Return joules, one number per package."""
        try:
            return [_joules(package / "energy_uj") for package in self.packages]
        except (OSError, ValueError):
            return None

    def between(self, before: list[float], after: list[float], seconds: float) -> float | None:
        """Return the sum of the differences; None if a counter may have wrapped twice."""
        total = 0.0
        for package, one, other in zip(self.packages, before, after, strict=True):
            try:
                ring = _joules(package / "max_energy_range_uj")
            except (OSError, ValueError):
                return None
            if seconds * _MOST_W > ring:
                return None
            total += (other - one) % ring
        return total


@dataclass
class EnergyMeter:
    """Measures one window at a time."""

    counter: Counter | None
    because: str = ""
    """The reason why there is no counter."""

    @property
    def source(self) -> str:
        """The name of the counter, or an empty string."""
        return self.counter.source if self.counter else ""

    def start(self) -> None:
        """Begin a window."""
        self._before = self.counter.now() if self.counter else None
        self._began = time.monotonic()

    def joules(self) -> float | None:
        """Return the energy since `start`; None without a counter, or in a window shorter than LEAST_S seconds."""
        seconds = time.monotonic() - self._began
        if self.counter is None or self._before is None or seconds < LEAST_S:
            return None
        after = self.counter.now()
        return None if after is None else self.counter.between(self._before, after, seconds)


def meter(gpu: NvmlGpu | None, because: str = "", *, cuda: bool = False, root: Path = RAPL) -> EnergyMeter:
    """Return a meter of the GPU, or of the CPU's packages if not `cuda`. because: the reason why `gpu` is None."""
    if cuda:
        if gpu is None:
            return EnergyMeter(None, because)
        if gpu.energy() is None:
            return EnergyMeter(None, "this GPU's driver counts no energy")
        return EnergyMeter(NvmlCounter(gpu))
    packages = [zone for zone in sorted(root.glob("intel-rapl:*")) if _is_package(zone)]
    if not packages:
        return EnergyMeter(None, f"this machine shows no energy counter of its CPU ({root})")
    counter = RaplCounter(packages)
    if counter.now() is None:
        return EnergyMeter(None, f"{packages[0] / 'energy_uj'} may not be read; its mode is for its owner to change")
    return EnergyMeter(counter)


def _is_package(zone: Path) -> bool:
    """Return whether a zone is a package, not a part of one (`intel-rapl:0:0`) and not the platform (`psys`)."""
    try:
        return (zone / "name").read_text().startswith("package")
    except OSError:
        return False


def _joules(file: Path) -> float:
    return int(file.read_text()) / 1e6
