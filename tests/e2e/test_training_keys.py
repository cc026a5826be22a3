"""Suites that choose an optimizer and how a batch is gone through, run as their users run them."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace

import pytest

from harness.analysis import verdict
from harness.analysis.run_facts import analyse
from harness.analysis.verdict_kind import VerdictKind
from harness.errors import Exit
from harness.records.record import Outcome, Record, Status, TrainingMeasured
from harness.report import html
from support.report_page import Page
from support.sandbox import Sandbox

pytestmark = pytest.mark.e2e

SUITE = """
suite: recipes
matrix:
  - model: tiny-llama
    task: toy-sentiment
    training: {steps: 6, batch: 8, warmup: 2, max_tokens: 24, lr: 5e-3}
    evaluation: {items: 32, batch: 16}
    cells:
      - {id: full, method: full, optimizer: adamw-8bit}
      - id: plus
        method: lora
        implementation: fused
        optimizer: paged-adamw-8bit
        training: {lr_ratio: 4}
        config: &lora {rank: 4, alpha: 8, targets: [q_proj, v_proj, down_proj]}
      - {id: exact, method: lora, dtype: float64, config: *lora}
      - {id: whole, method: lora, config: *lora, latency: never}
      - {id: parts, method: lora, config: *lora, training: {accumulate: 4, checkpointing: true}}
      - {id: fused, method: lora, config: *lora, implementation: fused, training: {accumulate: 4, checkpointing: true}}
      - {id: compiled, method: lora, config: *lora, implementation: fused, training: {compile: true}}
comparisons:
  - {same-losses: [whole, parts, fused, compiled], as: exact, says: parts are the same run}
"""


@pytest.fixture
def clean(sandbox: Sandbox) -> Sandbox:
    """A Bench with nothing of this process's environment but what a command needs: other tests compile in this process,
    and leave variables of torch's compiler behind."""
    if shutil.which("g++", path=os.defpath) is None:
        pytest.skip("torch.compile on a CPU needs g++")
    own = {key: value for key, value in sandbox.environment.items() if os.environ.get(key) != value}
    kept = {key: os.environ[key] for key in ("HOME", "LANG", "OMP_NUM_THREADS", "TMPDIR") if key in os.environ}
    return replace(sandbox, environment={**kept, "PATH": os.defpath, **own})


def trained(record: Record) -> TrainingMeasured:
    assert record.measurements is not None, record.because
    assert record.measurements.training is not None
    return record.measurements.training


def test_a_suite_with_optimizers_and_parts_runs_end_to_end(clean: Sandbox) -> None:
    sandbox = clean
    path = sandbox.folder / "recipes.yaml"
    path.write_text(SUITE, encoding="utf-8")
    finished = sandbox.command("run", str(path), "--out", "run")
    assert finished.code == Exit.PASS, finished.err + finished.out
    assert "pass: parts are the same run" in finished.out
    run = sandbox.read()
    assert {record.status for record in run.records} == {Status.OK}
    (judgement,) = verdict.judge(run).judgements
    assert (judgement.verdict.word, len(judgement.verdict.records)) == (VerdictKind.PASS, 5)

    (full,) = (r for r in run.records if r.cell.method == "full")
    assert trained(full).optimizer["class"] == "reference.operations.adamw8bit.AdamW8bit"
    assert full.measurements is not None
    in_32_bits = 2 * 4 * full.measurements.parameters.trainable
    assert full.measurements.memory.optimizer_B < in_32_bits / 2  # most of this model is in tensors of 4096 and more
    assert any("have moments in 8 bits" in note for note in full.notes)

    (plus,) = (r for r in run.records if r.cell.training.lr_ratio != 1)
    facts = trained(plus).optimizer
    assert facts["class"] == "harness.kernels.torch.optimizers.adamw8bit.AdamW8bit"
    assert (facts["paged_by"], facts["page_budget_B"]) == ("harness.kernels.torch.optimizers.paged.Paged", 0)
    assert [group["lr"] for group in facts["groups"]] == [5e-3, 4 * 5e-3]  # type: ignore[union-attr, index, call-overload]
    assert any("states of 0 of" in note for note in plus.notes)  # nothing of the tiny model is large enough

    for record in run.records:
        assert record.measurements is not None
        assert bool(record.measurements.latency) is record.cell.evaluation.latency
        merged = [c for c in record.checks if c.check.split("/")[1] == "merge" and c.outcome is Outcome.PASS]
        assert bool(merged) is (record.cell.method != "full")  # which is not about speed
    assert [r.cell.evaluation.latency for r in run.records].count(False) == 1

    (compiled,) = (r for r in run.records if r.cell.training.compile)
    (note,) = (note for note in compiled.notes if note.startswith("torch.compile"))
    assert re.search(r": [1-9]\d* graphs", note)
    assert any(check.check.startswith("lora/model/") and check.outcome is Outcome.PASS for check in compiled.checks)

    page = Page(html.render([analyse(run)])).text
    for said in (
        "paged-adamw-8bit lr_ratio=4",
        "accumulate=4 checkpointing",
        "[fused] compile",
        "The optimizers differ (",
    ):
        assert said in page


def test_without_a_compiler_a_cell_says_so_and_the_others_run(clean: Sandbox) -> None:
    sandbox = clean
    sandbox.environment["CXX"] = "no-such-compiler"
    path = sandbox.folder / "recipes.yaml"
    path.write_text(SUITE, encoding="utf-8")
    finished = sandbox.command("run", str(path), "--out", "run", "--only", "id=whole,id=compiled")
    assert finished.code == Exit.INFRASTRUCTURE, finished.err + finished.out
    by_how = {record.cell.training.compile: record for record in sandbox.read().records}
    assert by_how[False].status is Status.OK
    assert by_how[True].status is Status.ERROR
    for said in ("torch.compile failed", "no-such-compiler", "g++", "`compile: false`"):
        assert said in by_how[True].because
