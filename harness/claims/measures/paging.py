"""Measures: what paging an optimizer's states does, by the reference of it on a CPU. Imports torch only when computed.

A device of a stated size holds the states and what a batch takes; a long text takes more for one step. What moves is counted
in bytes, as a CPU has no second memory to page into: how long a move takes on a GPU these do not say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from harness.claims.measure import MeasureResult, Positive, measure

Part = Annotated[float, Field(gt=0, lt=1)]
"""A parameter that is a part of all states."""
_SEED, _LR = 0, 1e-3


@dataclass(frozen=True)
class _Run:
    """What a simulated training did. states: bytes of all of them; most: of states and spike on the device at a time.

    out, back: bytes moved to the host and back; same: whether the weights are those of the optimizer without pages.
    """

    states: int
    most: int
    out: int
    back: int
    same: bool


@measure("property")
def paging_survives_a_spike(
    spike: Part = 0.75, matrices: Positive = 6, rows: Positive = 400, columns: Positive = 300, steps: Positive = 5
) -> MeasureResult:
    """Check whether a step that leaves the states too little memory passes if these are paged, and training goes on as without.

    AdamW of so many matrices, on a device that their states fill. In the middle step a long text takes the part `spike` of
    it: states have to leave, and the step must not take more than the device has. At the end all weights must be, to the
    last bit, those of AdamW on a device that is large enough.
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
