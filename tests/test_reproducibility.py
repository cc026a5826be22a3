from __future__ import annotations

import math
from pathlib import Path

import recorded_run as recorded

from harness.analysis import reproducibility
from harness.records import Record


def test_a_rerun_is_equal_to_the_last_bit(tmp_path: Path) -> None:
    runs = [recorded.write_run(tmp_path / name, run=name) for name in ("a", "b")]
    found = reproducibility.reruns(runs)
    assert len(found) == 10
    assert all(r.equal and r.why == () for r in found)
    assert {r.same_losses for r in found if "zero-shot" in r.label} == {None}


def _nudged(name: str, r: Record) -> Record:
    if name != "fused":
        return r
    assert r.measurements is not None
    assert r.measurements.training is not None
    values = r.measurements.training.losses[:]
    values[7] = math.nextafter(values[7], 1.0)
    return recorded.with_losses(r, values).model_copy(update={"notes": ["atomics on this device"]})


def test_one_bit_is_found_with_its_step_and_its_cause(tmp_path: Path) -> None:
    first = recorded.write_run(tmp_path / "a")
    elsewhere = recorded.environment(id="other", threads=4)
    moved = lambda n, r: _nudged(n, r).model_copy(update={"environment": elsewhere})  # noqa: E731
    for name, change, cause in (("b", _nudged, "same environment, yet not equal"), ("c", moved, "threads: 2, 4")):
        again = recorded.write_run(tmp_path / name, change=change)
        (unequal,) = [r for r in reproducibility.reruns([first, again]) if not r.equal]
        assert (unequal.first_step, unequal.same_losses, unequal.same_items) == (7, False, True)
        assert unequal.why == (cause, "atomics on this device")


def test_failed_attempts_are_no_reruns(tmp_path: Path) -> None:
    good = recorded.record("fused", recorded.cells()["fused"], attempt=2)
    run = recorded.write_run(tmp_path / "r", only=["fused"], change=lambda _, r: recorded.failed(r), extra=[good])
    assert reproducibility.reruns([run]) == ()
