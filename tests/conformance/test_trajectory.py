"""`trajectory` with `--wide` also takes steps by the AdamW of bitsandbytes, and says so if it cannot.

A Method with its own optimizer takes no such steps.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from harness.conformance import self_test
from harness.conformance.comparison import optimizer_steps
from harness.conformance.execution import suite_run
from harness.conformance.faults import FaultCase, galore
from harness.conformance.faults.patched_copy import PatchedCopy
from harness.records.record import CheckResult, Outcome

CASE = FaultCase(values={"rank": 3, "alpha": 8.0})
NORM = "norm = norms(self.direction(W0_ED), self.per)"
KEPT_NORM = """key = (self.A._version, self.B._version, steps[0])
        if self.__dict__.get('_key') != key:
            self.__dict__.update(_key=key, _norm=norms(self.direction(W0_ED), self.per).detach())
        norm = self._norm"""


def trajectory(copy: PatchedCopy, *, wide: bool, method: str = "dora", case: FaultCase = CASE) -> CheckResult:
    plan = self_test._plan(method).model_copy(update={"checks": ["trajectory"]})
    (one,) = suite_run.run_case(self_test.implementation(method, copy), plan, case.of_kind("method"), wide=wide)
    return one.result


def test_a_cache_that_only_knows_the_optimizers_of_torch_fails_with_wide() -> None:
    pytest.importorskip("bitsandbytes")
    steps = [0]

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        steps[0] += isinstance(optimizer, torch.optim.AdamW)

    copy = PatchedCopy("reference.dora")
    copy.replace_line(NORM, KEPT_NORM)
    copy.module().steps = steps
    hook = register_optimizer_step_post_hook(count)
    try:
        assert trajectory(copy, wide=False).outcome is Outcome.PASS
        failed = trajectory(copy, wide=True)
    finally:
        hook.remove()
    assert failed.outcome is Outcome.FAIL
    assert failed.tensor.startswith("by bitsandbytes: ")
    assert trajectory(PatchedCopy("reference.dora"), wide=True).outcome is Outcome.PASS


def test_without_bitsandbytes_the_result_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    optimizer_steps.bitsandbytes_problem.cache_clear()
    try:
        result = trajectory(PatchedCopy("reference.dora"), wide=True)
        own_optimizer = trajectory(PatchedCopy("reference.galore"), wide=True, method="galore", case=galore.CASE)
    finally:
        optimizer_steps.bitsandbytes_problem.cache_clear()
    assert result.outcome is own_optimizer.outcome is Outcome.PASS
    assert result.detail.startswith("without bitsandbytes: ModuleNotFoundError")
    assert "bitsandbytes" not in own_optimizer.detail
