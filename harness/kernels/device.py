"""Choose where Operations run: in Triton on a GPU or in Triton's interpreter, otherwise in torch."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that the Triton kernels take. With float64, torch computes on every device."""


@cache
def interpreted() -> bool:
    """Return whether Triton's interpreter is on. The interpreter runs kernels on CPU tensors.

    The environment variable TRITON_INTERPRET=1 turns the interpreter on. It must be set before Triton is imported.
    """
    return os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None


@cache
def _compiles() -> bool:
    return find_spec("triton") is not None and not interpreted()


def by_triton(*tensors: Tensor) -> bool:
    """Return whether Triton computes with these tensors.

    True if Triton is installed, and all tensors are on a GPU or Triton's interpreter is on. In both cases, floating
    tensors must have one of `TRITON_DTYPES`.
    """
    runs = interpreted() or (_compiles() and all(t.is_cuda for t in tensors))
    return runs and all(t.dtype in TRITON_DTYPES for t in tensors if t.is_floating_point())


def multiplied_by_triton(*tensors: Tensor) -> bool:
    """Return whether Triton computes matrix products of these tensors.

    The result is that of `by_triton`, but False for float32 on a GPU. Without TF32, no matrix unit multiplies float32,
    and cuBLAS is faster. Only torch knows whether the user allows TF32. The interpreter multiplies float32, too, so
    that tests cover these kernels in every dtype.
    """
    return by_triton(*tensors) and (interpreted() or not any(t.dtype == torch.float32 for t in tensors))


def frozen(*tensors: Tensor | None) -> bool:
    """Return whether no tensor requires a gradient.

    Kernels of adapted layers require a frozen weight and bias, because they compute no gradients of the two.
    """
    return not any(t is not None and t.requires_grad for t in tensors)
