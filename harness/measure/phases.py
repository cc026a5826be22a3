"""The phases of a Cell's life, each with its own wall time and its own memory peak."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from harness.measure.memory import PeakMeter
from harness.records import Phase


class PhaseClock:
    """Times phases one after the other; `done` lists them, the running one included if it fails."""

    def __init__(self, meter: PeakMeter, announce: Callable[[str], None]) -> None:
        self.meter, self.announce = meter, announce
        self.done: list[Phase] = []
        self.current = ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the body as phase `name`."""
        self.current = name
        self.announce(name)
        self.meter.reset()
        load = _load()
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self.done.append(
                Phase(
                    name=name,
                    seconds=seconds,
                    peak_memory_B=self.meter.peak(),
                    end_memory_B=self.meter.now(),
                    load_start=load,
                    load_end=_load(),
                )
            )


def _load() -> float | None:
    """Return the load average over one minute, of the whole machine."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return None
