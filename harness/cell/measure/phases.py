"""Measure the phases of a Cell: wall and CPU time, memory peak, load average, energy and the state of the GPU."""

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

    announce: function that is called with the name of each phase when the phase begins. energy: None if energy is not
    measured. gpu: None on a CPU.
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
        started, cpu = time.perf_counter(), time.process_time()
        try:
            yield
            self.meter.synchronize()
        finally:
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
            energy = self.energy.joules()
            self.done.append(
                Phase(
                    name=name,
                    seconds=seconds,
                    peak_memory_B=self.meter.peak(),
                    end_memory_B=self.meter.now(),
                    load_start=load,
                    load_end=_load(),
                    cpu_seconds=cpu_seconds,
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
