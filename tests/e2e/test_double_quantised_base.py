"""A base in NF4 with double quantisation, from the suite to the report."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from harness.analysis.run_facts import analyse
from harness.errors import Exit
from harness.records import record as records
from harness.records import store
from harness.records.record import Outcome, Record
from harness.records.schemas import FOLDER
from harness.report import terminal
from support.sandbox import ForkSandbox

# Rows of whole blocks: what bitsandbytes does on some CPUs with others is not the matter here.
_CELL = "{{id: {0}, config: {{targets: [q_proj, v_proj]}}, base: {{quantization: {0}, implementation: bitsandbytes}}}}"
WIDTH, NARROW, LAYERS, BLOCK = 64, 32, 2, 64


@pytest.mark.nightly
def test_a_suite_names_it_and_its_cells_live(fork_sandbox: ForkSandbox) -> None:
    suite = fork_sandbox.suite(*(_CELL.format(base) for base in ("nf4", "nf4-dq")))
    planned = fork_sandbox.command("plan", suite, "--only", "base=nf4-dq", "--json")
    (cell,) = json.loads(planned.out)["cells"]
    assert cell["label"] == "tiny-llama lora r=4 [reference] on nf4-dq (bitsandbytes)"
    finished = fork_sandbox.command("run", suite, "--out", "run")
    assert finished.code == Exit.PASS, finished.err
    run = fork_sandbox.read()
    once, twice = run.latest().values()
    assert _codes(twice).outcome is Outcome.PASS
    assert sum(check.outcome is Outcome.PASS for check in twice.checks) == sum(
        check.outcome is Outcome.PASS for check in once.checks
    )
    assert _losses(twice) != _losses(once)
    assert _saved(once, twice) == LAYERS * sum(map(_less, (WIDTH * WIDTH, WIDTH * NARROW)))
    assert any("[reference] on nf4-dq (bitsandbytes)" in line for line in terminal.summary(analyse(run)))
    assert "on nf4-dq (bitsandbytes)" in (run.path / "report.html").read_text(encoding="utf-8")
    again = store.read_run(run.path).latest()[twice.cell_id]
    assert again.cell.base.quantization == "nf4-dq"


def _codes(record: Record) -> Any:
    (found,) = (check for check in record.checks if "/codes/" in check.check)
    return found


def _measured(record: Record) -> Any:
    assert record.measurements is not None, record.because
    return record.measurements


def _losses(record: Record) -> list[float]:
    losses: list[float] = _measured(record).training.losses
    return losses


def _saved(once: Record, twice: Record) -> int:
    saved: int = _measured(once).memory.weights_B - _measured(twice).memory.weights_B
    return saved


def _less(weights: int) -> int:
    """Return how many bytes double quantisation saves of a weight; where there are few blocks, its tables cost more.

    A constant takes one byte and no longer four. For that there are one constant of all (there are no more than 256), one
    mean, and a table of 256 values.
    """
    return 3 * (weights // BLOCK) - 4 - 4 - 4 * 256


def test_the_shipped_schemas_know_every_quantization() -> None:
    for name in ("record.schema.json", "run.schema.json"):
        schema = json.loads((FOLDER / name).read_text(encoding="utf-8"))
        assert schema["$defs"]["Base"]["properties"]["quantization"]["enum"] == list(get_args(records.Quantization))
