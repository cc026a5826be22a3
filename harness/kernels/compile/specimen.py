"""One instance of a kernel, to be compiled ahead of time and judged by its machine code without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["streaming", "gemm", "other"]
"""Streaming kernels must load and store 128 bits at a time; GEMMs must use matrix instructions; none may spill registers."""


@dataclass(frozen=True)
class Specimen:
    """One instance of a kernel, specialised as a launch would specialise it."""

    name: str
    """Name in registers.json, unique among all specimens."""
    kernel: Any
    """A function decorated by `triton.jit`."""
    signature: Mapping[str, str]
    """Argument -> Triton's type (`*bf16`, `i32`), for arguments that are no constexpr."""
    constants: Mapping[str, Any]
    """Argument -> value of a constexpr."""
    divisible: tuple[str, ...] = ()
    """Arguments that are multiples of 16, as torch's pointers are."""
    kind: Kind = "other"
    num_warps: int = 4
    num_stages: int = 3
    fused_multiply_add: bool = False
    """True to allow fused multiply-adds, which round a * b + c once."""
    separate_roundings: bool = False
    """Whether any fused multiply-add is a fault. Kernels that divide need False, because a division takes some."""
    narrow_loads: int = 0
    """Number of single-byte loads that a streaming kernel may have: from tables, of constants, or at a ragged end."""
    oldest: int = 80
    """Oldest architecture for which this specimen is compiled."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of Triton's compiler, such as maxnreg."""
