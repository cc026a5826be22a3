"""Specimens: instances of kernels to compile ahead of time. Their machine code is then judged without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["streaming", "gemm", "other"]
"""Instructions that the machine code of a kernel must contain. `streaming`: loads and stores of 128 bits. `gemm`: matrix
instructions. `other`: nothing in particular. In all three cases, a kernel must not spill registers.
"""


@dataclass(frozen=True)
class Specimen:
    """An instance of a Triton kernel: the kernel, with the types and constants for which it is compiled."""

    name: str
    """Unique name. registers.json lists the allowed registers per thread under this name."""
    kernel: Any
    """A function decorated by `triton.jit`."""
    signature: Mapping[str, str]
    """Name of an argument -> its Triton type, such as `*bf16` or `i32`. constexpr arguments are not listed."""
    constants: Mapping[str, Any]
    """Name of a constexpr argument -> its value."""
    divisible: tuple[str, ...] = ()
    """Names of the arguments that are multiples of 16, such as pointers to torch tensors."""
    kind: Kind = "other"
    num_warps: int = 4
    num_stages: int = 3
    fused_multiply_add: bool = False
    """True to let the compiler replace a * b + c by a fused multiply-add, which rounds only once."""
    separate_roundings: bool = False
    """True if a fused multiply-add in the compiled code is an error.

    A kernel that divides needs False, because a division is compiled to some fused multiply-adds.
    """
    narrow_loads: int = 0
    """Largest allowed number of single-byte loads in a streaming kernel.

    Such loads read tables, constants, or values after the last full 128 bits.
    """
    oldest: int = 80
    """Oldest GPU architecture for which the kernel is compiled, e.g. 80 for sm_80."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of Triton's compiler, such as maxnreg."""
