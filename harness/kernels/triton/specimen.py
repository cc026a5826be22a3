"""What is compiled ahead of time to judge a kernel without a GPU: one instance, and what its machine code must show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["streaming", "gemm", "other"]


@dataclass(frozen=True)
class Specimen:
    """One instance of a kernel, as a launch would specialise it.

    name: unique among all. signature: argument -> Triton's type (`*bf16`, `i32`), without the constants. divisible: the
    arguments that are multiples of 16, as torch's pointers are. kind: streaming kernels must load and store 128 bits at a
    time, GEMMs use the matrix instructions; none may spill registers. narrow_loads: how many instructions of a streaming
    kernel may load single bytes: from tables, of a block's constants, or in the branch for a ragged end.
    fused_multiply_add: whether a * b + c may be rounded once. separate_roundings: no instruction may do so; a division
    takes some that do. oldest: the architecture from which on it is compiled. options: more of Triton's, such as maxnreg.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: tuple[str, ...] = ()
    kind: Kind = "other"
    num_warps: int = 4
    num_stages: int = 3
    fused_multiply_add: bool = False
    separate_roundings: bool = False
    narrow_loads: int = 0
    oldest: int = 80
    options: Mapping[str, Any] = field(default_factory=dict)
