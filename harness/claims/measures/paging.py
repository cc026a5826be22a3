"""Measures: paging of optimizer states, by its reference on a CPU. Imports torch only when computed.

A simulated device of a given size holds the states and the memory of a batch; a long text needs more for one step. Moves are
counted in bytes; their time on a GPU is not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from harness.claims.measure import MeasureResult, Positive, measure

Part = Annotated[float, Field(gt=0, lt=1)]
"""A parameter that is a fraction of all states."""
_SEED, _LR = 0, 1e-3


@dataclass(frozen=True)
class _Run:
    """Result of a simulated training."""

    states: int
    """Bytes of all states."""
    most: int
    """Peak bytes of states and spike on the device."""
    out: int
    """Bytes moved to the host."""
    back: int
    """Bytes moved back."""
    same: bool
    """True if the weights equal those of the optimizer without paging."""


@measure("property")
def paging_survives_a_spike(
    spike: Part = 0.75, matrices: Positive = 6, rows: Positive = 400, columns: Positive = 300, steps: Positive = 5
) -> MeasureResult:
    """Check whether paging lets a step with a memory spike succeed, without changing the training.

    AdamW of `matrices` matrices, on a device that their states fill. In the middle step a long text takes the fraction
    `spike` of it: states must leave, and the step must not exceed the device. In the end all weights must equal, to the
    last bit, those of AdamW on a large enough device.
    """
    run = _train(spike, matrices, rows, columns, steps)
    need = run.states + int(spike * run.states)
    fits = run.most <= run.states < need
    how = f"a device of {run.states:,} B, states and spike {need:,} B; at most {run.most:,} B at a time, "
    how += f"{run.out:,} B left it and {run.back:,} B came back; "
    how += f"weights {'equal' if run.same else 'differ from'} those without pages"
    return MeasureResult(fits and run.out > 0 and run.same, how)


def _train(spike: float, matrices: int, rows: int, columns: int, steps: int) -> _Run:
    import torch

    from reference.operations.paged import Paged, is_paged

    if not is_paged(rows * columns):
        raise ValueError(f"the states of {rows} x {columns} are too small to be paged")
    random = torch.Generator().manual_seed(_SEED)
    start = [torch.randn(rows, columns, generator=random) for _ in range(matrices)]
    paged, plain = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    states = sum(2 * t.nbytes for t in start)  # two moments of each
    ours, other = Paged(torch.optim.AdamW(paged, lr=_LR), budget=states), torch.optim.AdamW(plain, lr=_LR)
    most = 0
    for step in range(steps):
        taken = int(spike * states) if step == steps // 2 else 0
        ours.budget = states - taken
        ours.make_room(ours.budget)  # the forward and backward pass of the long text come before the update
        ours.peak = ours.resident
        for one, its in zip(paged, plain, strict=True):
            one.grad = torch.randn(rows, columns, generator=random)
            its.grad = one.grad.clone()
        ours.step()
        other.step()
        most = max(most, ours.peak + taken)
    same = all(torch.equal(one, its) for one, its in zip(paged, plain, strict=True))
    return _Run(states, most, ours.bytes_out, ours.bytes_in, same)
