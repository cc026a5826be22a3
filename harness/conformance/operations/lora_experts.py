"""lora_experts: the gated experts of a mixture-of-experts block, with LoRA on every expert."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor

from harness.conformance.drawing.factors import BEYOND_8_BITS, LARGEST_SIZE, Factor, Matrix
from harness.conformance.operation import Arguments, Operation, draw
from reference.lora_experts import gated_experts, stacked_update

Experts = Annotated[int, Factor((1, 2, 3, 5, 8), (BEYOND_8_BITS,), least=1, most=16)]
Rank = Annotated[int, Factor((1, 2, 3, 5, 8, 16, 17), least=1, most=LARGEST_SIZE)]
Rows = Annotated[int, Factor((1, 2, 7, 33), (130, 515), least=1, most=64)]
Few = Annotated[int, Factor((1, 2, 3), (6,), least=1, most=16)]
Padding = Annotated[int, Factor((0, 3), least=0, most=16)]


def arguments(
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    shape: Matrix,
    experts: Experts,
    rank: Rank,
    tokens: Rows = 7,
    chosen: Few = 2,
    used: Experts = 16,
    padding: Padding = 0,
    transposed: bool = False,
    index: Literal["int64", "int32"] = "int64",
) -> Arguments:
    """Draw the arguments of one call.

    shape: (D, H), the features of a token and of an expert's hidden layer. experts: the number K of experts. chosen:
    number of experts per token. used: only the last `used` experts are chosen. If `chosen` is larger, every token
    chooses some of them more than once. padding: number of additional ranks in which A and B are zero, as in a
    server that reserves the same memory for every adapter. transposed: the weights are (K, inputs, outputs), as in
    gpt-oss. index: the dtype of the experts' numbers; the routers of servers return int32.
    """
    (D, H), K, total = shape, experts, rank + padding

    def stack(outputs: int, inputs: int) -> Tensor:
        sizes = (inputs, outputs) if transposed else (outputs, inputs)
        return draw(generator, dtype, K, *sizes, spread=inputs**-0.5)

    def low(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        A = draw(generator, dtype, K, total, inputs, spread=inputs**-0.5)
        B = draw(generator, dtype, outputs, total, K, spread=rank**-0.5)
        A[:, rank:], B[:, rank:] = 0, 0
        return A.flatten(0, 1), B.flatten(1)

    (up_A, up_B), (down_A, down_B) = low(2 * H, D), low(D, H)
    there = min(used, K)
    scores = torch.rand(tokens, there, generator=generator, dtype=torch.float64)
    order = scores.argsort(descending=True)
    return {
        "x": draw(generator, dtype, tokens, D),
        "chosen": (order[:, torch.arange(chosen) % there] + K - there).to(getattr(torch, index)),
        "weights": (torch.rand(tokens, chosen, generator=generator, dtype=torch.float64) + 0.1).to(dtype),
        "gate_up": stack(2 * H, D),
        "down": stack(D, H),
        "gate_up_A": up_A,
        "gate_up_B": up_B,
        "down_A": down_A,
        "down_B": down_B,
        "scaling": 1.5,
        "transposed": transposed,
    }


def reference(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_A: Tensor, gate_up_B: Tensor,
    down_A: Tensor, down_B: Tensor, scaling: float, transposed: bool,
) -> Tensor:  # fmt: skip
    """Return, for each token t, the sum over n of weights[t, n] times the output of expert chosen[t, n], shape (T, D).

    Expert k, from 0 to K - 1, computes down_k (silu(gate_k x) * up_k x). x is (T, D), chosen and weights are (T, N).
    gate_up is (K, 2 H, D) with the rows of the gate first, and down is (K, D, H); if `transposed`, the last two
    dimensions are swapped.
    scaling B_k A_k is added to the weights of each expert. A is (K R, inputs): the R rows of an expert are adjacent. B
    is (outputs, R K): the K columns of a rank are adjacent. Under autocast, the outputs of the experts may be added in
    its dtype or in float32.
    """
    experts = len(gate_up)
    update_up = stacked_update(gate_up_A, gate_up_B, experts, scaling, transposed)
    update_down = stacked_update(down_A, down_B, experts, scaling, transposed)
    return gated_experts(x, chosen, weights, gate_up + update_up, down + update_down, transposed)


# No `inputs`: the output grows with the square of x, so large inputs overflow.
OPERATION = Operation(
    name="lora_experts",
    outputs=("y",),
    arguments=arguments,
    reference=reference,
    differentiable=("x", "weights", "gate_up_A", "gate_up_B", "down_A", "down_B"),
)
