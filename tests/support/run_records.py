"""Access to the Records of a run that a test has made."""

from __future__ import annotations

import time
from pathlib import Path

from harness.assets import table
from harness.conformance.tolerance_constants import EPSILON
from harness.records import store
from harness.records.manifest import Footer
from harness.records.record import Record, TrainingMeasured
from harness.suites import loader


def source(name: str) -> table.Source:
    return table.resolve(name, loader.load("smoke").sources, Path())


def cells(run: store.Run, method: str = "lora") -> list[Record]:
    return [r for r in run.latest().values() if r.cell.method == method]


def trained(record: Record) -> TrainingMeasured:
    assert record.measurements is not None, record.because
    assert record.measurements.training is not None
    return record.measurements.training


def losses(record: Record) -> list[float]:
    return trained(record).losses


def adds_up(footer: Footer) -> bool:
    """Return whether the times of a footer add up to its total, up to rounding.

    Each time is a difference of two clock readings, which are rounded in the last place.
    """
    parts = [footer.seconds_in_cells, *footer.seconds_outside.values()]
    readings = 2 * (len(parts) + sum(footer.counts.values()))
    return abs(footer.seconds_total - sum(parts)) <= readings * EPSILON["float64"] * time.monotonic()


def one_message(err: str) -> str:
    assert "Traceback" not in err
    assert err.count("peft-harness: ") == 1, err
    return err[err.index("peft-harness: ") :]
