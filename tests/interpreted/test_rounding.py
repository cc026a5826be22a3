"""What kernels load and store in 16 bits: every bfloat16, and float32 numbers between two of them."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from harness.kernels.triton.support.rounding import load_as_float32, store_as


@triton.jit
def copied(source, target, count, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    store_as(target + i, load_as_float32(source + i, mask=i < count, other=0.0), mask=i < count)


def patterns(dtype: torch.dtype, count: int, generator: torch.Generator) -> torch.Tensor:
    if dtype == torch.float32:
        drawn = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)
        ties = (torch.arange(count // 2, dtype=torch.int64) << 17) + 0x8000
        drawn[: count // 2] = ties.to(torch.int32)
    else:
        drawn = torch.arange(count).to(torch.int16)
    return drawn.view(dtype)


@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_conversions_equal_those_of_torch(of: torch.dtype, to: torch.dtype) -> None:
    count = 1 << 16
    source = patterns(of, count, torch.Generator().manual_seed(0))
    target = torch.full((count + 1,), 3.0, dtype=to)
    copied[(1,)](source, target, count, SIZE=2 * count)
    want = source.float().to(to)
    same = (target[:-1] == want) & (target[:-1].signbit() == want.signbit())
    assert bool((same | (target[:-1].isnan() & want.isnan())).all())
    assert float(target[-1]) == 3.0
