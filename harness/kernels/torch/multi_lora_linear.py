"""A linear layer in which every sequence has its own LoRA adapter, or none.

    y_n = W x_n + s_i B_i A_i x_n   with i = ids[n]      Punica, arXiv:2310.18547, section 4; S-LoRA, arXiv:2311.03285

There is one product with W for all sequences, and one pair of thin products per adapter. In a batch sorted by adapter,
the sequences of an adapter are adjacent. No token is then copied, and the update is added to y in place. Letters in
shapes: N sequences of T tokens, D and E input and output features, R the rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from harness.kernels.card_tables import card
from harness.kernels.crossover import crossover_of
from harness.kernels.device import by_triton, frozen, multiplied_by_triton
from harness.kernels.torch.support.autocast import cast_by_autocast, outside_autocast

Rows = slice | Tensor


def groups(ids: Tensor, adapters: int) -> dict[int, list[int]]:
    """Return a dict: number of each adapter in `ids` -> ascending indices of the sequences with this adapter.

    ids: number of each sequence's adapter, or -1 for none. adapters: number of adapters. Raises ValueError for an id
    that is neither an adapter nor -1.
    """
    members: dict[int, list[int]] = {}
    for n, i in enumerate(ids.tolist()):
        if not -1 <= i < adapters:
            raise ValueError(f"id {i}: must be an adapter, 0 to {adapters - 1}, or -1 for none")
        if i >= 0:
            members.setdefault(i, []).append(n)
    return members


def _rows(members: list[int], device: torch.device) -> Rows:
    """Return the indices of an adapter's sequences: a slice if they are adjacent in the batch, else a tensor."""
    first, after = members[0], members[-1] + 1
    return slice(first, after) if after - first == len(members) else torch.tensor(members, device=device)


def _of(t: Tensor, rows: Rows) -> Tensor:
    """Return the tokens of some sequences of t (N, T, D) as a matrix (tokens, D). rows: indices of the sequences.

    The result is a view if `rows` is a slice and t is contiguous, else a copy.
    """
    chosen = t[rows] if isinstance(rows, slice) else t.index_select(0, rows)
    return chosen.reshape(-1, t.shape[-1])


def _add(to: Tensor, rows: Rows, low: Tensor, high: Tensor, scaling: float) -> None:
    """Add scaling low @ high to the tokens of the sequences `rows` of `to`, in place. to: (N, T, E), contiguous."""
    if isinstance(rows, slice):
        to[rows].view(-1, to.shape[-1]).addmm_(low, high, alpha=scaling)
    else:
        to.index_add_(0, rows, (low @ high).view(len(rows), *to.shape[1:]), alpha=scaling)


class _MultiLora(torch.autograd.Function):
    """Autograd function for `multi_lora_linear`. x: (N, T, D). adapters: the As, then the Bs of the used adapters.

    members: for each used adapter, the indices of its sequences, as `_rows` returns them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, members: list[Rows], scalings: list[float], *adapters: Tensor
    ) -> Tensor:
        As, Bs = adapters[: len(members)], adapters[len(members) :]
        y = linear(x, W).contiguous()
        low = [_of(x, rows) @ A.T for rows, A in zip(members, As, strict=True)]
        for rows, S, B, scaling in zip(members, low, Bs, scalings, strict=True):
            _add(y, rows, S, B.T, scaling)
        ctx.save_for_backward(x, W, *adapters, *low)
        ctx.members, ctx.scalings = members, scalings
        return y

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, *rest = ctx.saved_tensors
        k = len(ctx.members)
        As, Bs, low = rest[:k], rest[k : 2 * k], rest[2 * k :]
        need_x, need_W, _, _, *need = ctx.needs_input_grad
        dx = (dy @ W).contiguous() if need_x else None
        dW = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1]) if need_W else None
        dAs: list[Tensor | None] = [None] * k
        dBs: list[Tensor | None] = [None] * k
        for j, (rows, A, B, S, scaling) in enumerate(zip(ctx.members, As, Bs, low, ctx.scalings, strict=True)):
            own = _of(dy, rows)
            if torch.is_grad_enabled():  # for a second derivative S needs its graph
                S = _of(x, rows) @ A.T
            if need_x or need[j]:
                dS = (own @ B).mul_(scaling)
            if dx is not None:
                _add(dx, rows, dS, A, 1.0)
            if need[j]:
                dAs[j] = dS.T @ _of(x, rows)
            if need[k + j]:
                dBs[j] = (own.T @ S).mul_(scaling)
        return dx, dW, None, None, *dAs, *dBs


@cast_by_autocast
def multi_lora_linear(
    x: Tensor,
    W: Tensor,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scalings: Sequence[float],
    ids: Sequence[int] | Tensor,
) -> Tensor:
    """Return x W^T + s_i x A_i^T B_i^T, shape (N, ..., E). Sequence n has the adapter i = ids[n]; its scaling is s_i.

    If ids[n] is -1, the sequence gets only x W^T. Shapes: x (N, ..., D), W (E, D), As[i] (R_i, D), Bs[i] (E, R_i).
    These tensors have one floating dtype, or get it from autocast. ids: N integers. The result is differentiable in x,
    W, and the As and Bs in use: twice in torch, once in Triton. Raises ValueError if the lists differ in length, if the
    ids are not N integers, or if an id is neither -1 nor an adapter. Where `by_triton` allows it, Triton computes the
    call, unless products per adapter are expected to be faster (`_groups_above_crossover`). Without Triton, ids on an
    accelerator make the host wait.
    """
    if not len(As) == len(Bs) == len(scalings):
        raise ValueError(f"each adapter needs an A, a B and a scaling, got {len(As)}, {len(Bs)} and {len(scalings)}")
    chosen = torch.as_tensor(ids)
    if chosen.shape != x.shape[:1]:
        raise ValueError(f"ids must have shape ({len(x)},), one per sequence, got {tuple(chosen.shape)}")
    if chosen.is_floating_point() and len(chosen):  # torch reads an empty list as floats
        raise ValueError(f"ids must be integers, got {chosen.dtype}; hint: convert them by .long()")
    used = _groups_above_crossover(x, W, As, Bs, chosen) if by_triton(x, W, *As, *Bs) else groups(chosen, len(As))
    if used is None:
        from harness.kernels.triton import multi_lora_linear as gpu

        return gpu.multi_lora_linear(x, W, As, Bs, scalings, chosen)
    return products_per_adapter(x, W, As, Bs, scalings, used)


def _groups_above_crossover(
    x: Tensor, W: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor], ids: Tensor
) -> dict[int, list[int]] | None:
    """Return the result of `groups` if `products_per_adapter` is expected to be faster than Triton, else None.

    This is expected if the used adapters have more tokens on average than the crossover of the card; see
    `harness.kernels.crossover`. The result is always None

    - if the ids are on the GPU, or the sequences of an adapter are not adjacent: the host would have to wait;
    - if the tensors are float32 on a GPU;
    - if an unused adapter trains.
    """
    limit = crossover_of("multi_lora_linear", card(x.device), len(W))
    if limit == inf or ids.device.type != "cpu" or not multiplied_by_triton(x):
        return None
    used = groups(ids, len(As))
    sequences = sum(map(len, used.values()))
    adjacent = all(own[-1] - own[0] == len(own) - 1 for own in used.values())
    unused = [t for i in range(len(As)) if i not in used for t in (As[i], Bs[i])]
    if not adjacent or (torch.is_grad_enabled() and not frozen(*unused)):
        return None
    return used if sequences * prod(x.shape[1:-1]) > limit * len(used) else None


def products_per_adapter(
    x: Tensor,
    W: Tensor,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scalings: Sequence[float],
    used: Mapping[int, list[int]],
) -> Tensor:
    """Return the result of `multi_lora_linear`, computed by torch on every device.

    used: number of each used adapter -> indices of its sequences, as returned by `groups`.
    """
    tokens = x.reshape(len(x), prod(x.shape[1:-1]), x.shape[-1])
    rows, used_scalings = [_rows(own, x.device) for own in used.values()], [float(scalings[i]) for i in used]
    y: Tensor = _MultiLora.apply(tokens, W, rows, used_scalings, *(As[i] for i in used), *(Bs[i] for i in used))
    return y.view(*x.shape[:-1], len(W))
