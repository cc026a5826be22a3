"""The experts of a mixture-of-experts block, with LoRA on the layers of every expert.

    y_t = sum_n w_tn down_k(silu(gate_k x_t) * up_k x_t)   with k = chosen_tn, and LoRA (arXiv:2106.09685) on each weight

A row is a pair of a token and one of its experts. Rows are sorted by expert, so that the rows of an expert are
adjacent. Each expert multiplies its own slice of rows, and its low-rank term is added in place. The update B A, which
would be as large as the weights of all experts, is never computed. Letters in shapes: T tokens, N chosen experts per
token, P = T N rows, K experts, D and E input and output features, H features between up and down, R the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, silu

from harness.kernels.device import frozen, multiplied_by_triton
from harness.kernels.torch.support.autocast import cast_by_autocast, outside_autocast
from harness.kernels.torch.support.packed_weight import PackedStack, PackedWeight

_CACHED = 1 << 18
"""Number of float32 values that fit a processor's cache (1 MiB)."""


@dataclass(frozen=True)
class StackedLinear:
    """One linear layer of all experts: the stacked weights, the biases and LoRA's factors.

    The module's docstring explains the letters of shapes.
    """

    weight: Tensor | PackedWeight
    """Weights of the experts: (K, E, D), or (K, D, E) if `transposed`."""
    A: Tensor
    """LoRA's A of all experts: (K R, D), where the R rows of an expert are adjacent."""
    B: Tensor
    """LoRA's B of all experts: (E, R K), where the K columns of a rank are adjacent."""
    scaling: float
    transposed: bool = False
    bias: Tensor | None = None
    """Biases of the experts: (K, E). None for a layer without bias."""

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.weight.shape[0]

    def _weight(self) -> Tensor | PackedStack:
        if isinstance(self.weight, PackedWeight):
            return PackedStack(self.weight, self.transposed)
        return self.weight.transpose(1, 2) if self.transposed else self.weight

    def __call__(self, x: Tensor, counts: Tensor) -> Tensor:
        """Return the output (P, E) for rows x (P, D) sorted by expert. counts: number of rows of each expert, (K,)."""
        K, W = self.experts, self._weight()
        A, B = self.A.view(K, -1, self.A.shape[1]), self.B.view(len(self.B), -1, K).permute(2, 0, 1)
        y = grouped_lora_linear(x, W, A, B, self.scaling, counts)
        return y if self.bias is None else y + self.bias.repeat_interleave(counts, 0, output_size=len(x))


class _GroupedLora(torch.autograd.Function):
    """Autograd function that computes x W_k^T + scaling x A_k^T B_k^T for the rows of each expert k."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor | PackedStack, A: Tensor, B: Tensor, scaling: float, counts: Sequence[int]
    ) -> Tensor:
        y, low, columns = x.new_empty(len(x), W.shape[1]), x.new_empty(len(x), A.shape[1]), B.contiguous()
        matrix = _matrices(W, x.dtype)
        # Few calls that make views, since these calls take a third of the time for experts with few rows.
        own = zip(x.split(counts), low.split(counts), y.split(counts), A.mT.unbind(), columns.mT.unbind(), strict=True)
        for k, (x_k, low_k, y_k, A_k, B_k) in enumerate(own):
            if counts[k]:
                torch.mm(x_k, A_k, out=low_k)
                torch.mm(x_k, matrix(k).T, out=y_k)
                y_k.addmm_(low_k, B_k, alpha=scaling)
        ctx.save_for_backward(x, A, B, low, W if isinstance(W, Tensor) else None)
        ctx.packed = W if isinstance(W, PackedStack) else None
        ctx.scaling, ctx.counts = scaling, counts
        return y

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, low, W = ctx.saved_tensors
        matrix = _matrices(ctx.packed or W, x.dtype)
        B = B.contiguous()  # here, since a copy that the forward pass saved would have no second derivative
        need_x, need_W, need_A, need_B = ctx.needs_input_grad[:4]
        dx: list[Tensor] = []
        dW, dA, dB = (
            [torch.zeros_like(t[0])] * len(A) if need else [] for t, need in ((W, need_W), (A, need_A), (B, need_B))
        )
        for k, rows in _slices(ctx.counts):
            own = dy[rows]
            # For a second derivative, the low-rank product needs its graph.
            S = x[rows] @ A[k].T if torch.is_grad_enabled() else low[rows]
            dS = (own @ B[k]).mul_(ctx.scaling)
            if need_x:
                dx.append((own @ matrix(k)).addmm_(dS, A[k]))
            if need_W:
                dW[k] = own.T @ x[rows]
            if need_A:
                dA[k] = dS.T @ x[rows]
            if need_B:
                dB[k] = (own.T @ S).mul_(ctx.scaling)
        return (
            (torch.cat(dx) if dx else torch.zeros_like(x)) if need_x else None,
            *(torch.stack(one) if one else None for one in (dW, dA, dB)),
            None,
            None,
        )


def _matrices(W: Tensor | PackedStack, dtype: torch.dtype) -> Callable[[int], Tensor]:
    """Return a function that maps an expert's number to the expert's matrix (E, D).

    The function's next call may overwrite the matrix.
    """
    return W.matrices(dtype) if isinstance(W, PackedStack) else W.__getitem__


def _slices(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield (number, slice of its rows) for each expert that has rows. counts: number of rows per expert."""
    begin = 0
    for k, count in enumerate(counts):
        if count:
            yield k, slice(begin, begin + count)
        begin += count


def grouped_lora_linear(
    x: Tensor, W: Tensor | PackedStack, A: Tensor, B: Tensor, scaling: float, counts: Tensor
) -> Tensor:
    """Return x_p W_k^T + scaling x_p A_k^T B_k^T for each row p of expert k, shape (P, E).

    Shapes: x (P, D) sorted by expert, W (K, E, D), A (K, R, D), B (K, E, R), counts (K,). counts: number of rows of
    each expert. The tensors have one floating dtype, and any strides. In every forward and backward pass, a packed W is
    decoded: expert by expert in torch, the whole stack in Triton. The result is differentiable in x, A, B and a dense
    W: twice in torch; once in Triton, which takes only a frozen W. Without Triton, raises ValueError if the sum of
    `counts` is not P.
    """
    stored = W.weight.packed if isinstance(W, PackedStack) else W
    if multiplied_by_triton(x, stored, A, B) and frozen(stored):
        from harness.kernels.triton import lora_experts as gpu

        return gpu.grouped_lora_linear(x, W, A, B, scaling, counts)
    numbers = counts.tolist()
    if len(numbers) != len(W) or sum(numbers) != len(x):
        raise ValueError(f"counts must be {len(W)} numbers with the sum {len(x)}, one per expert; got {numbers}")
    y: Tensor = _GroupedLora.apply(x, W, A, B, scaling, numbers)
    return y


class _Reordered(torch.autograd.Function):
    """Autograd function that reorders the rows of t: row p of the output is row order[p] // copies of t.

    The backward pass sums the gradients of the copies of a row in a fixed order.
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.copies = copies
        return t.index_select(0, order // copies)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        order, inverse = ctx.saved_tensors
        each = _Reordered.apply(dy, inverse, order, 1)
        return each.view(-1, ctx.copies, dy.shape[-1]).sum(1) if ctx.copies > 1 else each, None, None, None


class _WeightedSum(torch.autograd.Function):
    """Autograd function that adds up the N rows of each token: y_t = sum_n weights[t, n] rows[at[t, n]], shape (T, D).

    rows (T N, D), weights (T, N), `at` (T, N): a permutation of the row numbers. order (T N): its inverse. In 16
    bits the sum is rounded once. A batched matrix product does the same; in bfloat16 it takes five times as long.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, order, at)
        return embedding_bag(at, rows, per_sample_weights=weights, mode="sum")

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, order, at = ctx.saved_tensors
        drows = dweights = None
        if ctx.needs_input_grad[0]:
            drows = _Reordered.apply(dy, order, at.flatten(), at.shape[1]) * weights.flatten()[order, None]
        if ctx.needs_input_grad[1]:
            dweights = _inner_products(rows, dy, order, at)
        return drows, dweights, None, None


def _inner_products(rows: Tensor, y: Tensor, order: Tensor, at: Tensor) -> Tensor:
    """Return sum_d rows[at[t, n], d] y[t, d], shape (T, N). The arguments are those of `_WeightedSum`; y (T, D).

    On a CPU, the rows of a few tokens at a time are copied and multiplied. So no copy of all rows is written to memory.
    In 16 bits the products are computed in float32, since torch multiplies small batched matrices of 16 bits slowly.
    """
    if not len(at):
        return rows.new_zeros(at.shape)
    dtype = torch.float32 if rows.device.type == "cpu" and rows.element_size() < 4 else rows.dtype
    few = max(1, _CACHED // max(1, at.shape[1] * rows.shape[1]))
    # A second derivative needs the graph of all rows: that of each piece would have a gradient for all rows.
    if torch.is_grad_enabled() or rows.device.type != "cpu" or few >= len(at):
        return _products(_Reordered.apply(rows, at.flatten(), order, 1), y, dtype)
    pieces = zip(at.split(few), y.split(few), strict=True)
    return torch.cat([_products(rows.index_select(0, some.flatten()), one, dtype) for some, one in pieces])


def _products(rows: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the inner products of each y[t] with its N adjacent rows, shape (T, N), computed in `dtype`."""
    own = rows.to(dtype).view(len(y), -1, y.shape[1])
    return (y.to(dtype).unsqueeze(1) @ own.mT).squeeze(1).to(rows.dtype)  # faster than a matrix by a column


def routed_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: StackedLinear,
    down: StackedLinear,
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return sum_n weights[t, n] down_k(activate(up_k(x_t))) with k = chosen[t, n], shape (T, D).

    Shapes: x (T, D), chosen and weights (T, N). chosen: numbers of the experts of each token. activate: maps the output
    of `up` to the input of `down`, row by row. Equal calls return the same bits. Raises ValueError if N is 0 or, on a
    CPU, if `chosen` has a number outside 0 to K - 1.
    """
    K, N, flat = up.experts, chosen.shape[1], chosen.reshape(-1)
    if not N:
        raise ValueError(f"chosen has the shape {tuple(chosen.shape)}: no expert per token; it needs at least one")
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    counts = torch.zeros(K, dtype=torch.int64, device=x.device)
    if flat.device.type == "cpu" and len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < K:
        raise ValueError(f"chosen has a number from {int(flat.min())} to {int(flat.max())}; experts are 0 to {K - 1}")
    counts.scatter_add_(0, flat.long(), torch.ones_like(flat, dtype=torch.int64))
    rows: Tensor = _Reordered.apply(x, order, inverse, N)
    out = down(activate(up(rows, counts)), counts)
    y: Tensor = _WeightedSum.apply(out, weights.to(out.dtype), order, inverse.view_as(chosen))
    return y


def gated(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, shape (P, H). gate_up (P, 2 H): the H columns of gate, then the H columns of up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


@cast_by_autocast
def lora_experts(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_A: Tensor, gate_up_B: Tensor,
    down_A: Tensor, down_B: Tensor, scaling: float, transposed: bool,
) -> Tensor:  # fmt: skip
    """Return the output of the gated experts, shape (T, D), with LoRA on gate_up and down.

    Shapes: x (T, D), chosen and weights (T, N), gate_up (K, 2 H, D), down (K, D, H); if `transposed`, gate_up (K, D, 2
    H) and down (K, H, D). gate_up_A (K R, D), gate_up_B (2 H, R K), down_A (K R, H) and down_B (D, R K) hold LoRA's
    factors of all experts; see `StackedLinear`. The floating tensors have one dtype, or get it from autocast. The
    result is differentiable in all of them, twice in torch; see `grouped_lora_linear` for Triton.
    """
    up = StackedLinear(gate_up, gate_up_A, gate_up_B, scaling, transposed)
    return routed_experts(x, chosen, weights, up, StackedLinear(down, down_A, down_B, scaling, transposed), gated)
