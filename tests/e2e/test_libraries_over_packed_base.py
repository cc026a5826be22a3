"""Libraries' adapters and quantisers together in a Cell: what one of them cannot do is said, and costs nothing else."""

from __future__ import annotations

import pytest

from harness.errors import Exit
from harness.records.record import Outcome, Status
from support.sandbox import ForkSandbox

SUITE = """\
suite: packed
title: Libraries over four bits
matrix:
  - model: tiny-llama
    task: toy-sentiment
    method: lora
    config: {rank: 2, targets: [q_proj]}
    training: {steps: 2, batch: 4, lr: 1e-3, max_tokens: 24}
    evaluation: {items: 4, batch: 4}
    cells:
      - {id: peft, implementation: hf-peft, base: {quantization: nf4, implementation: bitsandbytes}}
      - {id: torchao, implementation: reference, base: {quantization: nf4-dq, implementation: torchao}}
"""


@pytest.mark.nightly
def test_a_library_over_packed_weights_is_measured_or_says_why_not(fork_sandbox: ForkSandbox) -> None:
    (fork_sandbox.folder / "packed.yaml").write_text(SUITE, encoding="utf-8")
    ended = fork_sandbox.command("run", "packed.yaml", "--out", "run")
    records = {record.cell.implementation: record for record in fork_sandbox.read().records}
    # peft merges into 4 bits by packing again, which loses: that is a finding, and what was measured stands beside it.
    peft = records["hf-peft"]
    red = [one.check for one in peft.checks if one.outcome is Outcome.FAIL]
    assert peft.status is Status.OK
    assert red == ["lora/merge/float32/trained"]
    assert peft.measurements is not None
    assert {one.variant for one in peft.measurements.latency if one.seconds} == {
        "base", "unmerged", "multi-adapter"
    }  # fmt: skip
    # torchao packs whole blocks only, and the tiny model has none: not an error of anybody's.
    torchao = records["reference"]
    assert torchao.status is Status.SKIPPED
    assert "does not offer this: torchao supports matrices of whole blocks" in torchao.because
    assert ended.code == Exit.FAIL
