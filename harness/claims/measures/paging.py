"""Measures: paging of optimizer states, by the reference on a CPU. Imports torch only when a measure is computed.

A simulated device has a limited size. It holds the states, and the memory that a batch needs. A long text needs more
memory for one step, so states must move to the host. No time is measured.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from harness.claims.measure import MeasureResult, Positive, measure

ShareOfStates = Annotated[float, Field(gt=0, lt=1)]
"""A parameter that is a fraction of the bytes of all states."""
_SEED, _LR = 0, 1e-3


@measure("property")
def paging_survives_a_spike(
    spike: ShareOfStates = 0.75,
    matrices: Positive = 6,
    rows: Positive = 400,
    columns: Positive = 300,
    steps: Positive = 5,
) -> MeasureResult:
    """Check whether, with paging, a step with a memory spike succeeds, and the training gives the same weights.

    AdamW trains `matrices` matrices on a simulated device that is full of their states. In the middle step, a long text
    takes the fraction `spike` of the device. Paging must then move states to the host, and the step must not exceed the
    device. At the end, all weights must equal the weights of AdamW on a large enough device, to the last bit.
    """
    import torch

    from reference.operations.paged import Paged, is_paged

    if not is_paged(rows * columns):
        raise ValueError(f"the states of {rows} x {columns} are too small to be paged")
    random = torch.Generator().manual_seed(_SEED)
    start = [torch.randn(rows, columns, generator=random) for _ in range(matrices)]
    weights, expected = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    states = sum(2 * t.nbytes for t in start)  # two moments of each
    paged, plain = Paged(torch.optim.AdamW(weights, lr=_LR), budget=states), torch.optim.AdamW(expected, lr=_LR)
    peak = 0
    for step in range(steps):
        by_text = int(spike * states) if step == steps // 2 else 0
        paged.budget = states - by_text
        paged.make_room(paged.budget)  # the forward and backward pass of the long text come before the update
        paged.peak = paged.resident
        for one, other in zip(weights, expected, strict=True):
            one.grad = torch.randn(rows, columns, generator=random)
            other.grad = one.grad.clone()
        paged.step()
        plain.step()
        peak = max(peak, paged.peak + by_text)
    equal = all(map(torch.equal, weights, expected))
    needed = states + int(spike * states)
    how = f"a device of {states:,} B, states and spike of {needed:,} B; peak of {peak:,} B, "
    how += f"{paged.bytes_out:,} B moved to the host and {paged.bytes_in:,} B back; "
    how += f"weights {'equal' if equal else 'differ from'} those without paging"
    return MeasureResult(peak <= states < needed and paged.bytes_out > 0 and equal, how)
