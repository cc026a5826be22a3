"""A Cell that leaves a trainable tensor at its first value is `untrained`, with the tensor's name, everywhere."""

from __future__ import annotations

import csv

import pytest

from harness.errors import Exit
from harness.records.record import Outcome, Status
from support.sandbox import ForkSandbox


@pytest.mark.slow
def test_a_method_that_forgets_a_tensor_is_untrained(fork_sandbox: ForkSandbox) -> None:
    suite = fork_sandbox.suite("{implementation: [reference, forgets], training: {steps: 3, batch: 2}}")
    finished = fork_sandbox.command("run", suite, "--out", "run")
    assert finished.code == Exit.FAIL
    assert "training of 1 Cell left a tensor as it was" in finished.out
    by_name = {record.cell.implementation: record for record in fork_sandbox.read().latest().values()}
    assert by_name["reference"].status is Status.OK, by_name["reference"].because
    forgets = by_name["forgets"]
    assert (forgets.status, forgets.measurements) == (Status.UNTRAINED, None)
    (moved,) = (check for check in forgets.checks if check.outcome is Outcome.FAIL)
    tensor = moved.detail.removesuffix(" never moved")
    assert (moved.id.check, tensor.rpartition(".")[2]) == ("moved", "A")
    assert forgets.because == f"{tensor} never moved from the first value in 3 steps"
    assert forgets.because in finished.out
    assert fork_sandbox.command("report", "run").code == Exit.FAIL
    fork_sandbox.command("export", "run", "--format", "csv", "--out", "tables")
    with (fork_sandbox.folder / "tables" / "cells.csv").open(encoding="utf-8") as file:
        exported = {row["implementation"]: (row["status"], row["because"]) for row in csv.DictReader(file)}
    assert exported == {"reference": ("ok", ""), "forgets": ("untrained", forgets.because)}
    assert tensor in forgets.because
