"""`torch-compile`: the plain formulas of some Operations, compiled by torch.compile, to compare with libraries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType
from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported
from harness.methods.registry import Implementation, implementations_in, implements

if TYPE_CHECKING:
    import torch
    from torch import Tensor
_OPERATION: dict[str, Any] = {"name": "torch-compile", "kind": "operation", "devices": ["cuda"]}
"""Arguments of `implements`. GPUs only: on a CPU, compiling takes longer than all checks of another implementation."""
_OPTIONS: dict[str, Any] = {"compile_threads": 1}
"""Options of torch.compile. With more than one thread, inductor would start processes that outlive the call."""


@implements("lora_linear", **_OPERATION)
def lora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, mask: Tensor | None
) -> Tensor:
    """Return x W^T + bias + scaling ((x mask) A^T) B^T, computed in the dtype of x."""
    y: Tensor = _compiled(_lora, _kind(x, bias, mask))(x, W, bias, A, B, _number(scaling), mask)
    return y


@implements("dora_linear", **_OPERATION)
def dora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, m: Tensor, scaling: float, mask: Tensor | None
) -> Tensor:
    """Return the output of DoRA's layer in the dtype of x. The norms are computed in float32 and have no gradient."""
    y: Tensor = _compiled(_dora, _kind(x, bias, mask))(x, W, bias, A, B, m, _number(scaling), mask)
    return y


@implements("nf4_dequantize", **_OPERATION)
def nf4_dequantize(packed: Tensor, absmax: Tensor, block: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the decoded weight: the level of each code times the absmax of its block, multiplied in float32."""
    from harness.kernels.nf4_format import levels

    weight: Tensor = _compiled(_nf4, (packed.device, dtype, len(shape), block))(
        packed, absmax, levels().to(packed.device), block, tuple(shape), dtype
    )
    return weight


def _lora(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: Tensor, mask: Tensor | None
) -> Tensor:
    from torch.nn.functional import linear

    given = x if mask is None else x * mask
    return linear(x, W, bias) + scaling * linear(linear(given, A), B)


def _dora(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, m: Tensor, scaling: Tensor, mask: Tensor | None
) -> Tensor:
    import torch
    from torch.nn.functional import linear

    V = W.detach().float() + scaling * (B.detach().float() @ A.detach().float())
    norm = torch.linalg.vector_norm(V, dim=1)
    gain = torch.where(norm > 0, m / norm, 0.0).to(x.dtype)
    given = x if mask is None else x * mask
    return linear(x, W, bias) + (gain - 1) * linear(given, W) + gain * scaling * linear(linear(given, A), B)


def _nf4(
    packed: Tensor, absmax: Tensor, levels: Tensor, block: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    import torch

    size, flat = torch.Size(shape), packed.flatten()
    numel = size.numel()
    codes = torch.stack([flat >> 4, flat & 15], dim=1).flatten()[:numel]
    number = torch.arange(numel, device=packed.device) // block
    return (levels[codes.int()] * absmax[number]).to(dtype).view(size)


def _kind(x: Tensor, bias: Tensor | None, mask: Tensor | None) -> tuple[object, ...]:
    return x.device, x.dtype, x.dim(), x.is_contiguous(), x.requires_grad, bias is None, mask is None


@cache
def _number(value: float) -> Tensor:
    """Return a number as a 0-d float32 tensor on the CPU. For a float, torch would compile again for each new value.

    The tensor is cached, so it must not depend on the default dtype or on inference mode at the first call.
    """
    import torch

    with torch.inference_mode(False):
        return torch.tensor(value, device="cpu", dtype=torch.float32)


@cache
def _compiled(formula: FunctionType, kind: tuple[object, ...]) -> Callable[..., Any]:
    """Return a copy of a formula, compiled for arguments of one kind and of any size.

    kind: the device, followed by everything else on which the compiled code depends, such as the dtype. Each kind has a
    copy with its own code object, because torch limits the number of compiled versions of one function. If torch cannot
    compile a copy as a whole, the call of the copy raises an error. Raises Unsupported if there is no compiler.
    """
    import torch

    device = kind[0]
    if not isinstance(device, torch.device):
        raise TypeError(f"the kind begins with the device, got {device!r}")
    if why := _no_compiler(device.type):
        raise Unsupported(why)
    name = f"{formula.__name__}_{_compiled.cache_info().misses}"
    copy = FunctionType(formula.__code__.replace(co_name=name), formula.__globals__, name)
    made: Callable[..., Any] = torch.compile(copy, fullgraph=True, dynamic=True, options=_OPTIONS)
    return made


@cache
def _no_compiler(device: str) -> str:
    """Return the reason why torch.compile cannot compile for this type of device. If it can, return an empty string."""
    if device == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "torch.compile needs Triton for this GPU"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch.compile needs a C++ compiler, and there is none"
    return ""


def implementations() -> list[Implementation]:
    """Return the Implementations of this file. The entry point `reference` offers them."""
    return implementations_in(__name__)
