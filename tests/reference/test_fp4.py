"""FP4: its format by hand, its rules, and bitsandbytes' table. Its bytes are compared in test_four_bit_bytes.py."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional as bitsandbytes
from torch import Tensor

from reference.operations import fp4, nf4

TABLE = fp4.codebook()
MAGNITUDES = TABLE[:8].sort().values
MIDPOINTS = (MAGNITUDES[:-1] + MAGNITUDES[1:]) / 2


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes_of(*values: float) -> list[int]:
    """The codes of values beside a 1, which makes absmax 1 and the division exact."""
    return fp4.quantize(torch.tensor([1.0, *values]))[0][1:].tolist()


def test_the_constructed_table_is_bitsandbytes_table() -> None:
    table = bitsandbytes.get_4bit_type("fp4", device="cpu")
    assert table.dtype == TABLE.dtype
    assert torch.equal(table, TABLE)


def test_the_format_equals_a_worked_example() -> None:
    assert torch.equal(TABLE[:8], torch.tensor([0, 1 / 16, 8, 12, 4, 6, 2, 3]) / 12)
    assert torch.equal(TABLE[8:], -TABLE[:8])
    assert TABLE.signbit().tolist() == [False] * 8 + [True] * 8


def test_every_value_is_encoded_to_its_code() -> None:
    assert codes_of(*TABLE[1:8].tolist()) == list(range(1, 8))
    assert codes_of(*TABLE[9:].tolist()) == list(range(9, 16))
    assert codes_of(0.0, -0.0) == [0, 0]


def test_a_tie_takes_the_smaller_magnitude_on_both_sides() -> None:
    order = TABLE[:8].sort().indices.tolist()
    assert codes_of(*MIDPOINTS.tolist()) == order[:7]
    assert codes_of(*(-MIDPOINTS).tolist()) == [8 + code for code in order[:7]]
    above = torch.nextafter(MIDPOINTS, torch.ones(()))
    assert codes_of(*above.tolist()) == order[1:]
    assert codes_of(*(-above).tolist()) == [8 + code for code in order[1:]]


def test_a_value_that_rounds_to_zero_preserves_its_sign_bit() -> None:
    assert codes_of(1e-3, -1e-3, 1e-30, -1e-30) == [0, 8, 0, 8]


def test_every_element_takes_the_nearest_value() -> None:
    W = draw(500, 64)
    codes, absmax = fp4.quantize(W)
    x = W.double() / absmax.double()[:, None]
    error = (TABLE.double()[codes.long()].view(500, 64) - x).abs()
    best = (TABLE.double() - x[..., None]).abs().amin(-1)
    # An element that nearly touches a midpoint is as near to either, within the rounding of x.
    assert bool((error - best <= 2 * torch.finfo(torch.float32).eps).all())


def test_zeros_infinity_and_nan() -> None:
    W = torch.zeros(4, 64)
    W[1, :4] = torch.tensor([float("nan"), 1, -1, 0])
    W[2, :4] = torch.tensor([float("inf"), 1, -1, 0])
    W[3] = 1
    codes, absmax = fp4.quantize(W)
    values = fp4.dequantize(codes, absmax).view(4, 64)
    assert torch.equal(values[[0, 3]], W[[0, 3]])
    assert not bool(values[1:3].isfinite().any())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_read_as_float32(dtype: torch.dtype) -> None:
    W = draw(5, 64).to(dtype)
    for have, want in zip(fp4.quantize(W), fp4.quantize(W.float()), strict=True):
        assert torch.equal(have, want)


def test_packing_pads_with_the_code_of_zero() -> None:
    codes = fp4.quantize(torch.tensor([-1.0, 1.0, 1.0]))[0]
    assert fp4.pack(codes).tolist() == [0xB3, 0x30]
    assert torch.equal(nf4.unpack(fp4.pack(codes), 3), codes)


@pytest.mark.parametrize("block", [0, -64])
def test_a_block_has_at_least_one_element(block: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        fp4.quantize(draw(8), block)
