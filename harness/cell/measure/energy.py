"""Energy: joules between two moments, where a driver or the kernel counts them. Never estimated, never 0 for unknown."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from harness.cell.measure.nvml import NvmlGpu

LEAST_S = 2.0
"""NVML's counter moves every 20 to 100 ms: of a shorter window it may be wrong by many per cent."""
RAPL = Path("/sys/class/powercap")
# No package draws more. A counter of RAPL starts anew at some 262 kJ, and after twice that nobody knows how often it did.
_MOST_W = 1000.0


class Counter(Protocol):
    """Something that counts joules."""

    source: str

    def now(self) -> list[float] | None:
        """Return what its counters stand at, in joules, or None if they cannot be read."""

    def between(self, before: list[float], after: list[float], seconds: float) -> float | None:
        """Return joules from one reading to another, or None if they do not tell."""


@dataclass
class NvmlCounter:
    """The counter of one GPU; it starts anew only with the driver."""

    gpu: NvmlGpu
    source: str = "nvml"

    def now(self) -> list[float] | None:
        """Return joules since the driver was loaded."""
        spent = self.gpu.energy()
        return None if spent is None else [spent]

    def between(self, before: list[float], after: list[float], seconds: float) -> float | None:
        """Return the difference; None if the driver was loaded anew."""
        return after[0] - before[0] if after[0] >= before[0] else None


@dataclass
class RaplCounter:
    """The counters of the CPU packages (Intel's and AMD's), each of which starts anew at a number of its own."""

    packages: list[Path]
    source: str = "rapl"

    def now(self) -> list[float] | None:
        """Return joules, one number per package."""
        try:
            return [_joules(package / "energy_uj") for package in self.packages]
        except (OSError, ValueError):
            return None

    def between(self, before: list[float], after: list[float], seconds: float) -> float | None:
        """Return the sum of the differences; None if a counter may have started anew twice."""
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
    """Measures one window at a time. counter: None where nothing counts; `because` then says why."""

    counter: Counter | None
    because: str = ""

    @property
    def source(self) -> str:
        """Who counts, or an empty string."""
        return self.counter.source if self.counter else ""

    def start(self) -> None:
        """Begin a window."""
        self._before = self.counter.now() if self.counter else None
        self._began = time.monotonic()

    def joules(self) -> float | None:
        """Return what was spent since `start`; None if nothing counts, or in a window of under LEAST_S seconds."""
        seconds = time.monotonic() - self._began
        if self.counter is None or self._before is None or seconds < LEAST_S:
            return None
        after = self.counter.now()
        return None if after is None else self.counter.between(self._before, after, seconds)


def meter(gpu: NvmlGpu | None, because: str = "", *, cuda: bool = False, root: Path = RAPL) -> EnergyMeter:
    """Return a meter of the GPU, or if the run is on the CPU of its packages. because: why there is no `gpu`."""
    if cuda:
        if gpu is None:
            return EnergyMeter(None, because)
        told = gpu.energy() is not None
        return EnergyMeter(NvmlCounter(gpu)) if told else EnergyMeter(None, "this GPU's driver counts no energy")
    packages = [zone for zone in sorted(root.glob("intel-rapl:*")) if _is_package(zone)]
    if not packages:
        return EnergyMeter(None, f"this machine shows no energy counter of its CPU ({root})")
    counter = RaplCounter(packages)
    if counter.now() is None:
        return EnergyMeter(None, f"{packages[0] / 'energy_uj'} may not be read; its mode is for its owner to change")
    return EnergyMeter(counter)


def _is_package(zone: Path) -> bool:
    """Tell a package from its parts (`intel-rapl:0:0`), which it counts too, and from the whole platform (`psys`)."""
    try:
        return (zone / "name").read_text().startswith("package")
    except OSError:
        return False


def _joules(file: Path) -> float:
    return int(file.read_text()) / 1e6
