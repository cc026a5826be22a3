"""Several LoRA adapters in one batch: Punica, arXiv:2310.18547, and S-LoRA, arXiv:2311.03285. An Operation, not a Method.

    y_n = W0 x_n + s_i B_i A_i x_n   with i = ids[n]          (Punica, section 4: y := y + x A_i B_i, row by row)

One product with W0 serves the whole batch, and every sequence adds the update of its own adapter. Shape letters: N
sequences, T tokens, D input features, E output features, R rank (each adapter has its own).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reference.spec import Deviation, ReferenceSpec

SPEC = ReferenceSpec(
    paper="arXiv:2310.18547v1, section 4 (SGMV); arXiv:2311.03285v3, section 5 (batched computation, ranks that differ)",
    deviations=(
        Deviation(
            topic="orientation",
            paper="x A B with A (D, R), B (R, E)",
            here="x A^T B^T with A (R, D), B (E, R)",
            why="this is the layout of lora.py and HF peft",
        ),
        Deviation(
            topic="scaling",
            paper="none; it is part of B",
            here="the update of each adapter is multiplied by its s_i",
            why="adapters with different alpha / r share a batch",
        ),
        Deviation(
            topic="sequences without an adapter",
            paper="every request has one",
            here="id -1: the base output alone, to the last bit",
            why="HF peft's `__base__` does the same",
        ),
        Deviation(
            topic="computation",
            paper="kernels that gather adapters by segment or by page",
            here="a loop over the adapters",
            why="the sum is the same; the papers add speed",
        ),
    ),
)
NONE = -1
"""Id of a sequence without an adapter."""


def multi_lora_linear(
    x: Tensor,
    base_out: Tensor,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scalings: Sequence[float],
    ids: Sequence[int] | Tensor,
) -> Tensor:
    """Return `base_out` plus the update of each sequence's adapter. The result is (N, ..., E), in the dtype of `base_out`.

    x: (N, ..., D). base_out: W0 x plus the bias, (N, ..., E). As[i]: (R_i, D). Bs[i]: (E, R_i). ids: one integer per
    sequence, an index into As and Bs, or -1 for no adapter. Gradients reach x, base_out and the A and B of every
    adapter in use. For the A and B of other adapters, the gradient is None. Raises ValueError if As, Bs and scalings
    differ in length, if ids are not one integer per sequence, or if an id is neither -1 nor an index of an adapter.
    """
    chosen = torch.as_tensor(ids, device=x.device)
    if not len(As) == len(Bs) == len(scalings):
        raise ValueError(f"each adapter needs an A, a B and a scaling, got {len(As)}, {len(Bs)} and {len(scalings)}")
    if chosen.shape != x.shape[:1]:
        raise ValueError(f"ids must have shape ({len(x)},), one per sequence, got {tuple(chosen.shape)}")
    if chosen.is_floating_point() and len(chosen):  # torch reads an empty list as floats
        raise ValueError(f"ids must be integers, got {chosen.dtype}; hint: convert them by .long()")
    for invalid in chosen[(chosen < NONE) | (chosen >= len(As))].tolist():
        raise ValueError(f"id {invalid}: must be an adapter, 0 to {len(As) - 1}, or {NONE} for none")
    y = base_out
    for i, (A, B, scaling) in enumerate(zip(As, Bs, scalings, strict=True)):
        rows = (chosen == i).nonzero()[:, 0]
        if len(rows):
            update = scaling * (x[rows] @ A.T @ B.T)
            y = y.index_add(0, rows, update.to(y.dtype))
    return y
