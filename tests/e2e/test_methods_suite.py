"""Methods other than LoRA through a whole run: the suite that tries them all, and what 16 bits must not take for a fault."""

from __future__ import annotations

import pytest

from harness.errors import Exit
from harness.methods.spec import methods
from harness.records.record import Record, Status
from harness.suites import loader, model_checks
from support.sandbox import ForkSandbox

# Steps of 1e-6 are far below what bfloat16 can tell apart: only the masters move.
_UNSEEN = "{implementation: reference, method: dora, dtype: bfloat16, training: {lr: 1e-6}}"
_OWN_OPTIMIZER = "{implementation: reference, method: galore, dtype: bfloat16}"
_SHRINKING = (
    "{implementation: reference, method: adalora, dtype: float16, "
    "config: {target_rank: 2, total_steps: 12, tinit: 3, tfinal: 3, delta_t: 1}}"
)


def test_the_suite_holds_every_method_and_fits() -> None:
    suite = loader.load("methods")
    plan = suite.plan
    model_checks.check_models(suite, plan)
    # What trains nothing cannot be tried by training.
    assert {(cell.method, cell.dtype) for cell in plan.cells} == {
        (method, dtype) for method in methods() if method != "frozen" for dtype in ("float32", "bfloat16")
    } | {("peft", "float32")}


@pytest.mark.nightly
def test_other_methods_live_through_a_run_in_sixteen_bits(fork_sandbox: ForkSandbox) -> None:
    finished = fork_sandbox.command("run", fork_sandbox.suite(_UNSEEN, _OWN_OPTIMIZER, _SHRINKING), "--out", "run")
    assert finished.code == Exit.PASS, finished.err
    records = {record.cell.method: record for record in fork_sandbox.read().records}
    assert {method: record.status for method, record in records.items()} == dict.fromkeys(
        ("dora", "galore", "adalora"), Status.OK
    )
    assert _optimizer(records["galore"]) == "GaLore"
    assert any("GaLore, the Method's own" in note for note in records["galore"].notes)
    for record in records.values():
        outcomes = {check.check.split("/")[1]: check.outcome.value for check in record.checks}
        assert (outcomes["frozen"], outcomes["moved"]) == ("pass", "pass")
    merged = {
        method: any(time.seconds for time in record.measurements.latency if time.variant == "merged")
        for method, record in records.items()
        if record.measurements is not None
    }
    assert merged == {"dora": True, "adalora": True, "galore": False}


def _optimizer(record: Record) -> object:
    assert record.measurements is not None
    assert record.measurements.training is not None
    return record.measurements.training.optimizer["name"]
