"""Where an Operation runs: by Triton on a GPU, by Triton's interpreter if that is on, else vectorised in torch."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels compute in; float64 goes the way of torch on every device."""


@cache
def interpreted() -> bool:
    """Whether Triton's kernels are run on CPU tensors, which TRITON_INTERPRET=1 asks for before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None


@cache
def _compiles() -> bool:
    return find_spec("triton") is not None and not interpreted()


def by_triton(*tensors: Tensor) -> bool:
    """Return whether these tensors go to a Triton kernel: all on a GPU, or the interpreter is on, and in its dtypes.

    Integer tensors (codes) have no say in the dtype.
    """
    where = interpreted() or (_compiles() and all(t.is_cuda for t in tensors))
    return where and all(t.dtype in TRITON_DTYPES for t in tensors if t.is_floating_point())


def multiplied_by_triton(*tensors: Tensor) -> bool:
    """Return whether the layer of these goes to Triton's matrix products: as `by_triton` says, but on a GPU not in float32.

    Without TF32 no matrix unit multiplies that, and cuBLAS is ahead; and whether TF32 is allowed only torch looks up. By
    the interpreter it goes all the same, which is how these kernels are tested in every dtype.
    """
    return by_triton(*tensors) and (interpreted() or not any(t.dtype == torch.float32 for t in tensors))


def frozen(*tensors: Tensor | None) -> bool:
    """Return whether none of these is to be trained: the kernels of adapted layers have no gradient for the base's own."""
    return not any(t is not None and t.requires_grad for t in tensors)
