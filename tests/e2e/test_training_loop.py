"""`loop: trl` and `check --loop trl` as users run them, with trl and without."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import replace

import pytest

from harness.analysis import run_verdict
from harness.analysis.run_facts import analyse
from harness.analysis.verdict_kind import VerdictKind
from harness.errors import Exit
from harness.records.record import Status
from harness.report import html
from support.report_page import Page
from support.sandbox import Sandbox

pytestmark = pytest.mark.e2e
needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="an optional dependency: pip install trl"
)

SUITE = """
suite: loops
matrix:
  - model: tiny-llama
    task: toy-sentiment
    method: lora
    training: {steps: 6, batch: 8, warmup: 2, max_tokens: 24, lr: 5e-3}
    evaluation: {items: 16, batch: 16}
    config: {rank: 4, alpha: 8, targets: [q_proj, v_proj, down_proj]}
    latency: never
    cells:
      - {id: ours, implementation: reference}
      - {id: trl, implementation: fused, training: {loop: trl, accumulate: 2}}
      - {id: exact, dtype: float64}
comparisons:
  - {same-losses: [ours, trl], as: exact, says: SFTTrainer trains as the harness does}
"""


@pytest.fixture
def without_trl(sandbox: Sandbox) -> Sandbox:
    """A sandbox in which no trl can be imported."""
    broken = sandbox.folder / "without" / "trl"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'trl'\", name='trl')\n")
    path = os.pathsep.join([str(broken.parent), sandbox.environment["PYTHONPATH"]])
    return replace(sandbox, environment={**sandbox.environment, "PYTHONPATH": path})


@pytest.mark.nightly
@needs_trl
def test_a_cell_trained_by_sfttrainer_has_the_losses_of_the_harness(sandbox: Sandbox) -> None:
    path = sandbox.folder / "loops.yaml"
    path.write_text(SUITE, encoding="utf-8")
    done = sandbox.command("run", str(path), "--out", "run")
    assert done.code == Exit.PASS, done.err + done.out
    run = sandbox.read()
    (record,) = [one for one in run.records if one.cell.training.loop == "trl"]
    assert record.measurements is not None
    assert record.measurements.training is not None
    assert record.measurements.training.outside_seconds is not None
    assert record.measurements.memory.counted_peak_B
    assert "trl" in record.environment.software
    assert any(note.startswith("trained by trl; it spent") for note in record.notes)
    assert [judged.verdict.word for judged in run_verdict.judge(run).judgements] == [VerdictKind.PASS]
    text = Page(html.render([analyse(run)])).text
    assert "loop=trl" in text
    assert "SFTTrainer trains as the harness does" in text


@pytest.mark.nightly
def test_without_trl_its_cell_is_skipped_and_names_the_command(without_trl: Sandbox) -> None:
    suite = without_trl.suite("{id: a, implementation: reference, training: {loop: trl}}")
    without_trl.command("run", suite, "--out", "run")
    (record,) = without_trl.read().records
    assert record.status is Status.SKIPPED
    assert "`loop: trl` needs trl" in record.because
    assert "`peft-harness env create trl`" in record.because
    assert "`environment: trl`" in record.because


def test_without_trl_the_check_names_the_command(without_trl: Sandbox) -> None:
    done = without_trl.command("check", "--loop", "trl", "--json")
    assert done.code == Exit.INFRASTRUCTURE, done.err
    document = json.loads(done.out)
    assert document["untried"] == ["loop trl"]
    assert "needs trl" in document["skipped"]["loop trl"]
    assert "`peft-harness env create trl`" in document["skipped"]["loop trl"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--loop", "tlr"), "unknown loop `tlr`"),
        (("--loop", "dpo"), "DPO and GRPO are out of scope"),
        (("--loop", "trl", "fused"), "checks a training loop, not an implementation"),
    ],
)
def test_a_wrong_use_is_refused(arguments: tuple[str, ...], said: str, sandbox: Sandbox) -> None:
    done = sandbox.command("check", *arguments)
    assert done.code == Exit.USAGE
    assert said in done.err
    assert "hint:" in done.err
