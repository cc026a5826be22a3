"""Measure the phases of a Cell: wall time, memory peak, load average, energy and the state of the GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from harness.cell.measure.energy import EnergyMeter
from harness.cell.measure.gpu import GpuWatch
from harness.cell.measure.memory import PeakMeter
from harness.records.record import Phase


class PhaseClock:
    """A meter of the phases of a Cell, one after the other. `done` lists the results, including those of failed phases.

    announce: function that is called with the name of each phase when the phase begins. energy, gpu: meters; None if
    the machine has no such meter.
    """

    def __init__(
        self,
        meter: PeakMeter,
        announce: Callable[[str], None],
        energy: EnergyMeter | None = None,
        gpu: GpuWatch | None = None,
    ) -> None:
        self.meter, self.announce = meter, announce
        self.energy, self.gpu = energy or EnergyMeter(None, "energy was not requested"), gpu
        self.done: list[Phase] = []
        self.current = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the body of the context as phase `name`."""
        self.current = name
        self.announce(name)
        self.meter.reset()
        load = _load()
        if self.gpu:
            self.gpu.begin()
        self.energy.start()
        started = time.perf_counter()
        try:
            yield
            self.meter.synchronize()
        finally:
            seconds = time.perf_counter() - started
            energy = self.energy.joules()
            self.done.append(
                Phase(
                    name=name,
                    seconds=seconds,
                    peak_memory_B=self.meter.peak(),
                    end_memory_B=self.meter.now(),
                    load_start=load,
                    load_end=_load(),
                    energy_J=energy,
                    gpu=self.gpu.end() if self.gpu else None,
                )
            )


def _load() -> float | None:
    """Return the machine's load average over one minute; None if the system has none."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return None
