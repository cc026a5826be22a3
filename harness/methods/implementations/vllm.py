"""`vllm`, `vllm-triton`: vLLM's LoRA operations in torch (for CPUs) and in Triton (for GPUs), as `multi_lora_linear`.

The operations get the same arguments as in vLLM: the adapters in slots of one stacked tensor, padded with zeros to the
largest rank; B multiplied by the scaling in the adapter's dtype, as vLLM does on loading; and one slot per token, or -1
for a token without adapter. Like vLLM, these functions call no operation for a batch without adapters. On a CPU,
Triton's interpreter runs the kernels: `TRITON_INTERPRET=1 peft-harness check vllm-triton`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported
from harness.methods.registry import Implementation, implementations_in, implements

if TYPE_CHECKING:
    from torch import Tensor
MAX_PRODUCTS = 1 << 22
"""Largest number of multiplications in a case for Triton's interpreter, which needs seconds for this number."""
_Add = Callable[["Tensor", "Tensor", "Tensor", "Tensor", "Tensor"], None]
"""Function that adds the update of every token to y, in place. Its arguments are y, x, the stacked As, the stacked Bs and
the slot of each token."""


def _linear(
    add: _Add, x: Tensor, W: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor], scalings: Sequence[float], ids: Tensor
) -> Tensor:
    """Return x W^T plus the update of each sequence, which `add` computes.

    As, Bs, scalings: one per adapter. ids: index of one adapter per sequence, or -1 for none.
    """
    import torch

    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, W, *As, *Bs)):
        raise Unsupported("vLLM's LoRA operations have no backward pass")
    y = torch.nn.functional.linear(x, W).contiguous()
    if bool((ids < 0).all()):
        return y
    rank, (E, D) = max(len(A) for A in As), W.shape
    A, B = x.new_zeros(len(As), 1, rank, D), x.new_zeros(len(As), 1, E, rank)
    for slot, (a, b, scaling) in enumerate(zip(As, Bs, scalings, strict=True)):
        A[slot, 0, : len(a)] = a
        B[slot, 0, :, : len(a)] = b * scaling
    tokens = ids.repeat_interleave(x.shape[1])
    add(y.view(-1, E), x.reshape(-1, D), A, B, tokens)
    return y


@implements(
    "multi_lora_linear", name="vllm", kind="operation", dtypes=("float32", "bfloat16", "float16"), requires=["vllm"]
)
def multi_lora_linear(**arguments: Any) -> Tensor:
    """Return the output of a layer with several adapters, computed by vLLM's operations for CPUs.

    It runs `bgmv_shrink` and `bgmv_expand_slice` as `PunicaWrapperCPU.add_lora_linear` does. arguments: those of
    `_linear` after `add`.
    """

    def add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, slots: Tensor) -> None:
        import torch
        from vllm.lora.ops import torch_ops

        between = torch.zeros(len(x), A.shape[2], dtype=torch.float32, device=x.device)
        torch_ops.bgmv_shrink(x, A, between, slots, 1.0)
        torch_ops.bgmv_expand_slice(between, B, y, slots, 0, y.shape[1], add_inputs=True)

    return _linear(add, **arguments)


@implements(
    "multi_lora_linear", name="vllm-triton", kind="operation", dtypes=("float16",), devices=("cpu",),
    requires=["vllm", "triton"],
)  # fmt: skip
def multi_lora_linear_triton(**arguments: Any) -> Tensor:
    """Return the output of a layer with several adapters, computed by vLLM's Triton kernels.

    It runs `lora_shrink` and `lora_expand` as `PunicaWrapperGPU.add_lora_linear` does. arguments: those of `_linear`
    after `add`.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise Unsupported("set TRITON_INTERPRET=1: on a CPU, Triton's kernels run only in its interpreter")
    x, W = arguments["x"], arguments["W"]
    if x.shape[0] * x.shape[1] * (W.shape[0] + W.shape[1]) * max(map(len, arguments["As"])) > MAX_PRODUCTS:
        raise Unsupported(f"more than {MAX_PRODUCTS:,} multiplications would take the interpreter too long")
    return _linear(_add_triton, **arguments)


def _add_triton(y: Tensor, x: Tensor, A: Tensor, B: Tensor, slots: Tensor) -> None:
    import torch

    shrink, expand, meta = _triton_ops()
    meta = meta.make(len(A), len(x), device=x.device)
    meta.prepare_tensors(slots)
    between = torch.zeros(1, len(x), A.shape[2], dtype=torch.float32, device=x.device)
    shrink(x, [A], between, *meta.meta_args(len(x), False), 1.0)
    expand(between, [B], y, *meta.meta_args(len(x), False), offset_start=0, add_inputs=True)


def _triton_ops() -> tuple[Any, Any, Any]:
    """Return vLLM's `_lora_shrink`, `_lora_expand` and LoRAKernelMeta, even if vLLM finds no driver and hides Triton."""
    import triton
    import triton.language as tl
    from vllm import triton_utils

    if triton_utils.triton is not triton:
        triton_utils.triton, triton_utils.tl = triton, tl
    from vllm.lora.ops.triton_ops.lora_expand_op import _lora_expand
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
    from vllm.lora.ops.triton_ops.lora_shrink_op import _lora_shrink

    return _lora_shrink, _lora_expand, LoRAKernelMeta


def implementations() -> list[Implementation]:
    """Return the Implementations of this file."""
    return implementations_in(__name__)
