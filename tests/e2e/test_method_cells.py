"""LoHa, LoKr and OFT go through Cells by the reference and by HF peft, and both compute one training run."""

from __future__ import annotations

import pytest

from harness.errors import Exit
from harness.records.record import Outcome
from support.sandbox import ForkSandbox

_SUITE = """
suite: two
title: Two implementations
about: For tests.
matrix:
  - model: tiny-llama
    task: toy-sentiment
    training: {{steps: 6, batch: 4, max_tokens: 24, lr: 5e-3}}
    evaluation: {{items: 8, batch: 8}}
    method: {method}
    config: {config}
    cells:
      - {{id: both, implementation: [reference, hf-peft]}}
      - {{id: exact, implementation: reference, dtype: float64}}
      - {{id: other, implementation: [reference, hf-peft], config: {other}}}
comparisons:
  - {{same-losses: both, as: exact, says: both implementations compute one run}}
"""


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("method", "config", "other"),
    [
        ("loha", "{rank: 3, alpha: 40, targets: [q_proj]}", "{rank_dropout: 0.25}"),
        ("lokr", "{rank: 1, alpha: 8, factor: 4, targets: [q_proj]}", "{rank_dropout: 0.25}"),
        ("oft", "{block_size: 8, targets: [q_proj]}", "{terms: 8}"),
    ],
)
def test_reference_and_peft_have_the_losses_of_float64(
    method: str, config: str, other: str, fork_sandbox: ForkSandbox
) -> None:
    (fork_sandbox.folder / "mine.yaml").write_text(_SUITE.format(method=method, config=config, other=other))
    finished = fork_sandbox.command("run", "mine.yaml", "--out", "run")
    assert finished.code == Exit.PASS, finished.out + finished.err
    assert "pass: both implementations compute one run" in finished.out
    records = fork_sandbox.read().records
    assert len(records) == 5
    for record in records:
        judged = {check.check.split("/")[1]: check.outcome for check in record.checks}
        assert {judged[name] for name in ("forward", "gradient", "merge", "moved", "frozen")} == {Outcome.PASS}
