"""Suites that choose an optimizer and how a batch is gone through, run as their users run them."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace

import pytest

from harness.analysis import run_verdict
from harness.analysis.run_facts import analyse
from harness.analysis.verdict_kind import VerdictKind
from harness.errors import Exit
from harness.records.record import Outcome, Record, Status, TrainingMeasured
from harness.report import html
from harness.suites import loader
from support.report_page import Page
from support.sandbox import ForkSandbox, Sandbox

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
    """A sandbox with nothing of this process's environment but what a command needs: other tests compile in this process,
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


def finished(sandbox: Sandbox, *only: str) -> dict[str, Record]:
    """Run Cells of the suite; return their Records by the ids of the suite."""
    path = sandbox.folder / "recipes.yaml"
    path.write_text(SUITE, encoding="utf-8")
    done = sandbox.command("run", str(path), "--out", "run", "--only", ",".join(f"id={name}" for name in only))
    run, ids = sandbox.read(), loader.load(path).plan.ids
    assert done.code == Exit.PASS, done.err + done.out
    assert {record.status for record in run.records} == {Status.OK}
    for record in run.records:
        assert record.measurements is not None
        assert bool(record.measurements.latency) is record.cell.evaluation.latency
        merged = [c for c in record.checks if c.check.split("/")[1] == "merge" and c.outcome is Outcome.PASS]
        assert bool(merged) is (record.cell.method != "full")  # which is not about speed
    return {ids[record.cell_id]: record for record in run.records}


@pytest.mark.nightly
def test_optimizers_of_a_suite(fork_sandbox: ForkSandbox) -> None:
    records = finished(fork_sandbox, "full", "plus")
    full, plus = records["full"], records["plus"]
    assert trained(full).optimizer["class"] == "reference.operations.adamw8bit.AdamW8bit"
    assert full.measurements is not None
    in_32_bits = 2 * 4 * full.measurements.parameters.trainable
    assert full.measurements.memory.optimizer_B < in_32_bits / 2  # most of this model is in tensors of 4096 and more
    assert any("have moments in 8 bits" in note for note in full.notes)

    facts = trained(plus).optimizer
    assert facts["class"] == "harness.kernels.torch.optimizers.adamw8bit.AdamW8bit"
    assert (facts["paged_by"], facts["page_budget_B"]) == ("harness.kernels.torch.optimizers.paged.Paged", 0)
    assert [group["lr"] for group in facts["groups"]] == [5e-3, 4 * 5e-3]  # type: ignore[union-attr, index, call-overload]
    assert any("states of 0 of" in note for note in plus.notes)  # nothing of the tiny model is large enough

    page = Page(html.render([analyse(fork_sandbox.read())])).text
    assert "paged-adamw-8bit lr_ratio=4" in page
    assert "The optimizers differ (" in page


@pytest.mark.nightly
def test_a_batch_in_parts_and_a_compiled_step_are_the_same_run(clean: Sandbox) -> None:
    records = finished(clean, "exact", "whole", "parts", "fused", "compiled")
    run = clean.read()
    (judgement,) = run_verdict.judge(run).judgements
    assert (judgement.verdict.word, len(judgement.verdict.records)) == (VerdictKind.PASS, 5)
    assert [r.cell.evaluation.latency for r in run.records].count(False) == 1
    compiled = records["compiled"]
    (note,) = (note for note in compiled.notes if note.startswith("torch.compile"))
    assert re.search(r": [1-9]\d* graphs", note)
    assert any(check.check.startswith("lora/model/") and check.outcome is Outcome.PASS for check in compiled.checks)
    page = Page(html.render([analyse(run)])).text
    assert "accumulate=4 checkpointing" in page
    assert "[fused] compile" in page


@pytest.mark.nightly
def test_without_a_compiler_a_cell_says_so(clean: Sandbox) -> None:
    sandbox = clean
    sandbox.environment["CXX"] = "no-such-compiler"
    path = sandbox.folder / "recipes.yaml"
    path.write_text(SUITE, encoding="utf-8")
    done = sandbox.command("run", str(path), "--out", "run", "--only", "id=compiled")
    assert done.code == Exit.INFRASTRUCTURE, done.err + done.out
    (record,) = sandbox.read().records
    assert record.status is Status.ERROR
    for said in ("torch.compile failed", "no-such-compiler", "g++", "`compile: false`"):
        assert said in record.because
