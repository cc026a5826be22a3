"""Launches of kernels: run a launch, or describe it for ahead-of-time compilation of the same kernel instance.

Every launch goes through `launch`. Triton itself launches on the current device, which need not be the device of the
tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from harness.kernels.compile.specimen import Kind, Specimen
from harness.kernels.device import interpreted

_POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8", torch.int64: "*i64",
}  # fmt: skip


def launch(kernel: Any, grid: tuple[int, ...], /, *positional: Any, **named: Any) -> Any:
    """Launch the kernel on the device of the first tensor among the arguments. Return the compiled kernel.

    Triton's interpreter compiles nothing, so the result is then None. An exception gets a note that describes the
    launch.
    """
    first = next(one for one in (*positional, *named.values()) if isinstance(one, Tensor))
    if interpreted():
        _mend_interpreter()
    try:
        with torch.cuda.device_of(first):
            return kernel[grid](*positional, **named)
    except BaseException as error:
        given = dict(zip(getattr(kernel, "arg_names", ()), positional, strict=False)) | named
        described = ", ".join(f"{name}={_short(value)}" for name, value in given.items())
        error.add_note(f"in kernel {getattr(kernel, '__name__', kernel)}, grid {grid}: {described}")
        raise


@cache
def _mend_interpreter() -> None:
    """Let the interpreter of Triton 3.6 use a tensor with one element as an integer, e.g. as the end of a loop.

    This interpreter calls `int` with an array, and NumPy 2.4 and later raise an error if the array has a dimension.
    Triton 3.7 fixes this.
    """
    if not triton.__version__.startswith("3.6."):
        return
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


def _short(value: Any) -> str:
    """Describe an argument of a kernel: a tensor by its dtype and shape, any other value by its text."""
    if not isinstance(value, Tensor):
        return str(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


@dataclass(frozen=True)
class KernelLaunch:
    """A launch of a kernel with its arguments. It can be run, or described for ahead-of-time compilation."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    """Name of an argument -> tensor, integer, float or None."""
    constants: Mapping[str, Any]
    """Name of a constexpr argument -> its value."""
    num_warps: int = 4
    num_stages: int = 3

    def run(self) -> Any:
        """Launch the kernel, and return what `launch` returns."""
        return launch(
            self.kernel, self.grid, **self.arguments, **self.constants,
            num_warps=self.num_warps, num_stages=self.num_stages, enable_fp_fusion=True,
        )  # fmt: skip

    def specimen(self, name: str, kind: Kind | None = None, *, oldest: int = 80) -> Specimen:
        """Return a description of the kernel instance that this launch would compile.

        None and the integer 1 become constants, and multiples of 16 are marked, as in a launch by Triton. kind: by
        default `gemm` for a kernel with 16-bit tensors, else `other`, because no matrix unit multiplies float32.
        """
        halves = any(isinstance(one, Tensor) and one.element_size() == 2 for one in self.arguments.values())
        fixed = {n: one for n, one in self.arguments.items() if one is None or (type(one) is int and one == 1)}
        rest = {n: one for n, one in self.arguments.items() if n not in fixed}
        return Specimen(
            name=name,
            kernel=self.kernel,
            signature={n: _type(one) for n, one in rest.items()},
            constants={**fixed, **self.constants},
            divisible=tuple(n for n, one in rest.items() if isinstance(one, Tensor) or one % 16 == 0),
            kind=kind or ("gemm" if halves else "other"),
            oldest=oldest,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            fused_multiply_add=True,
        )


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def meta(dtype: torch.dtype, *shape: int) -> Tensor:
    """Return a tensor without memory, for describing a launch."""
    return torch.empty(shape, dtype=dtype, device="meta")


def strides(names: str, matrix: Tensor | None) -> dict[str, int]:
    """Return a dict: each name in `names` -> a stride of the matrix. For None, both strides are zero.

    names: two names in one string, separated by a space.
    """
    return dict(zip(names.split(), (0, 0) if matrix is None else matrix.stride(), strict=True))
