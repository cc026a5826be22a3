"""Double quantisation and the dynamic 8-bit map: by hand, and byte for byte against bitsandbytes on the CPU."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from bitsandbytes import functional as bitsandbytes
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from reference.operations import double_quant, nf4
from reference.operations.dynamic_map import _values, dequantize_blockwise, dynamic_map, quantize_blockwise

SIGNED, UNSIGNED = dynamic_map(signed=True), dynamic_map(signed=False)
maps = pytest.mark.parametrize("code", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])
EPS = torch.finfo(torch.float32).eps
BLOCK = double_quant.BLOCK
GRID = 2**16
MILLION = 1_000_003
NAN, INF = float("nan"), float("inf")


class Difference(NamedTuple):
    """How many bytes and decoded values differ from bitsandbytes' (0.50.2, CPU), and why."""

    codes: int
    values: int
    why: str


STEP = "bitsandbytes' CPU kernel rounds x / absmax to one of 65,536 steps, of which none is 0, and looks the step up"
ZERO = "it gives a block of zeros byte 0 (-0.993) and not that of zero; absmax is 0, so that it decodes to the same"
LOST = "1 / absmax overflows below 2.9e-39: what is not 0 becomes +-1, and 0 x infinity is read as step 0, -0.993"
QUIET = "it leaves a NaN out of absmax and reads it as step 0, so that it comes back as -0.993 absmax, a number"
INFINITE = "0 x infinity is NaN, which it reads as step 0: the block comes back as infinities, not as NaN"
DIFFERENCES = {
    ("signed", "zeros"): Difference(256, 0, ZERO),
    ("signed", "zeros, short block"): Difference(3, 0, ZERO),
    ("signed", "levels"): Difference(9, 9, STEP),
    ("signed", "ties"): Difference(131, 131, STEP),
    ("signed", "near zero"): Difference(92, 92, STEP),
    ("signed", "absmax 1e-39"): Difference(253, 253, LOST),
    ("signed", "NaN"): Difference(255, 256, QUIET),
    ("signed", "infinity"): Difference(256, 256, INFINITE),
    ("unsigned", "levels"): Difference(14, 14, STEP),
    ("unsigned", "ties"): Difference(130, 130, STEP),
    ("unsigned", "near zero"): Difference(77, 77, STEP),
    ("unsigned", "absmax 1e-39"): Difference(127, 127, LOST),
    ("unsigned", "NaN"): Difference(255, 256, QUIET),
    ("unsigned", "infinity"): Difference(256, 256, INFINITE),
}
CODES = {"signed": SIGNED, "unsigned": UNSIGNED}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def midpoints(code: Tensor) -> Tensor:
    return (code[:-1] + code[1:]) / 2


def theirs(x: Tensor, code: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    codes, state = bitsandbytes.quantize_blockwise(x, code=code, blocksize=block)
    return codes.flatten(), state.absmax


def on_their_grid(x: Tensor, block: int = BLOCK) -> Tensor:
    """Return x / absmax rounded to their grid: what the table of their CPU kernel can tell apart."""
    blocks = torch.nn.functional.pad(x.flatten().float(), (0, -x.numel() % block)).view(-1, block)
    scaled = (blocks * (1 / blocks.abs().amax(1, keepdim=True))).clamp(-1, 1)
    step = (((scaled + 1) * 0.5).double() * (GRID - 1) + 0.5).float().int()  # one rounding: theirs is fused
    return (step.float() * 2 / (GRID - 1) - 1).flatten()[: x.numel()]


def special(code: Tensor) -> dict[str, Tensor]:
    steps = torch.linspace(-1, 1, 256)
    return {
        "nothing": torch.zeros(0),
        "one": torch.tensor([-3.0]),
        "zeros": torch.zeros(256),
        "zeros, short block": torch.cat([steps, torch.zeros(3)]),
        "levels": torch.cat([code, code[:100]]),
        "ties": torch.cat([torch.ones(1), midpoints(code)]),
        "near zero": torch.cat([torch.ones(1), steps[1:] * 1e-4]),
        "short block": steps[:77] * 5,
        "absmax 1e-38": steps * 1e-38,
        "absmax 1e-39": steps * 1e-39,
        "huge": steps * torch.finfo(torch.float32).max,
        "NaN": torch.cat([torch.tensor([NAN, 1.0, -1.0, 0.0]), steps, torch.ones(252)]),
        "infinity": torch.cat([torch.tensor([INF, 1.0, -1.0, 0.0]), steps, torch.ones(252)]),
        "float16": (steps * torch.finfo(torch.float16).max).half(),
        "bfloat16": (steps * torch.finfo(torch.bfloat16).max).bfloat16(),
    }


CASES = [(kind, name) for kind, code in CODES.items() for name in special(code)]


@maps
def test_the_constructed_map_is_bitsandbytes_map(code: Tensor) -> None:
    table = bitsandbytes.create_dynamic_map(signed=code is SIGNED)
    assert table.dtype == code.dtype
    assert torch.equal(table, code)


def test_the_map_is_real_after_a_first_use_without_values() -> None:
    _values.cache_clear()
    with FakeTensorMode():
        assert dynamic_map().shape == (256,)
    assert torch.equal(dynamic_map(), SIGNED)
    dynamic_map().zero_()
    assert torch.equal(dynamic_map(), SIGNED)


def test_the_map_equals_a_worked_example() -> None:
    for code, sides, first in ((SIGNED, 2, 1), (UNSIGNED, 1, 2)):
        assert len(code.unique()) == 256
        assert bool((code.diff() > 0).all())
        for i in range(7):  # in the decade 10^(i - 7) .. 10^(i - 6) twice as many as in the one below
            inside = (code.abs().double() > 10.0 ** (i - 7)) & (code.abs().double() < 10.0 ** (i - 6))
            assert int(inside.sum()) == sides * first * 2**i
    assert 0.0 in SIGNED.tolist()
    assert float(SIGNED[-1]) == 1
    assert torch.equal(-SIGNED[:127].flip(0), SIGNED[128:-1])  # symmetric but for 1, which has no negative
    assert torch.equal(SIGNED[[-2, -3]], torch.tensor([1 - 0.9 / 128, 1 - 3 * 0.9 / 128]))  # middles of 64 cells
    assert float(UNSIGNED[0]) == 0


@maps
def test_every_element_takes_the_nearest_level(code: Tensor) -> None:
    x = draw(3000)
    codes, absmax = quantize_blockwise(x, code, 100)
    scaled = x.double().view(30, 100) / absmax.double()[:, None]
    error = (code.double()[codes.long()].view(30, 100) - scaled).abs()
    best = (code.double() - scaled[..., None]).abs().amin(-1)
    assert bool((error - best <= EPS).all())
    assert torch.equal(absmax, x.view(30, 100).abs().amax(1))


@maps
def test_a_tie_takes_the_lower_level(code: Tensor) -> None:
    ties = midpoints(code)
    assert quantize_blockwise(torch.cat([torch.ones(1), ties]), code)[0][1:].tolist() == list(range(255))
    above = torch.nextafter(ties, torch.tensor(INF))
    assert quantize_blockwise(torch.cat([torch.ones(1), above]), code)[0][1:].tolist() == list(range(1, 256))


@maps
def test_a_map_quantises_itself(code: Tensor) -> None:
    codes, absmax = quantize_blockwise(code, code)
    assert (codes.tolist(), absmax.tolist()) == (list(range(256)), [1.0])
    assert torch.equal(dequantize_blockwise(codes, absmax, code), code)


@maps
def test_zeros_stay_zeros_and_infinities_are_not_decoded_to_finite_numbers(code: Tensor) -> None:
    x = torch.zeros(3, 64)
    x[1, :3] = torch.tensor([NAN, 1, -1])
    x[2, :3] = torch.tensor([INF, 1, -1])
    values = dequantize_blockwise(*quantize_blockwise(x, code, 64), code, 64).view(3, 64)
    assert torch.equal(values[0], x[0])
    assert not bool(values[1:].isfinite().any())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_read_as_float32(dtype: torch.dtype) -> None:
    x = draw(1000).to(dtype)
    for have, want in zip(quantize_blockwise(x, SIGNED), quantize_blockwise(x.float(), SIGNED), strict=True):
        assert torch.equal(have, want)


def test_a_block_has_at_least_one_element() -> None:
    with pytest.raises(ValueError, match="at least one"):
        quantize_blockwise(draw(4), SIGNED, 0)


@maps
@pytest.mark.parametrize("block", [64, 256, 4096])
def test_a_million_bytes_equal_bitsandbytes_except_at_its_steps(code: Tensor, block: int) -> None:
    x = draw(MILLION, seed=block)
    x = x if code is SIGNED else x.abs()
    codes, absmax = quantize_blockwise(x, code, block)
    their_codes, their_absmax = theirs(x, code, block)
    assert torch.equal(absmax, their_absmax)
    # Put on their steps first, every byte is the same: the steps are the whole difference.
    on_steps = torch.bucketize(on_their_grid(x, block), midpoints(code))
    assert torch.equal(on_steps.to(torch.uint8), their_codes)
    # And it decides only elements within half a step of a midpoint: about two (signed) or three in a thousand.
    scaled = x / absmax.repeat_interleave(block)[:MILLION]
    nearest = torch.minimum(
        *(
            (scaled - midpoints(code)[(torch.bucketize(scaled, midpoints(code)) - side).clamp(0, 254)]).abs()
            for side in (0, 1)
        )
    )
    differ = codes != their_codes
    assert bool(differ.any())
    assert bool((nearest[differ] <= 1 / (GRID - 1) + 2 * EPS).all())
    assert int(differ.sum()) <= int((nearest <= 1 / (GRID - 1) + 2 * EPS).sum())


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{kind}: {name}" for kind, name in CASES])
def test_special_cases_are_bitsandbytes_or_listed(kind: str, name: str) -> None:
    code = CODES[kind]
    x = special(code)[name]
    codes, absmax = quantize_blockwise(x, code)
    their_codes, their_absmax = theirs(x, code)
    values, their_values = (
        dequantize_blockwise(*each, code) for each in ((codes, absmax), (their_codes, their_absmax))
    )
    listed = DIFFERENCES.get((kind, name), Difference(0, 0, ""))
    same = (values == their_values) | (values.isnan() & their_values.isnan())
    assert (int((codes != their_codes).sum()), int((~same).sum())) == listed[:2], listed.why
    if listed.why != QUIET:
        assert torch.equal(absmax, their_absmax)


def test_every_listed_case_occurs() -> None:
    assert set(DIFFERENCES) <= set(CASES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", [64, 4096])
def test_double_quantised_weights_are_bitsandbytes(block: int, dtype: torch.dtype) -> None:
    W = (draw(1023, 1000, seed=block) * 0.02).to(dtype)
    _, state = bitsandbytes.quantize_4bit(W, blocksize=block, quant_type="nf4", compress_statistics=True)
    absmax = nf4.quantize(W, block)[1]
    c2, c1, offset = double_quant.quantize(absmax)
    assert torch.equal(offset, state.offset)
    assert torch.equal(c1, state.state2.absmax)
    assert (offset.dtype, c1.dtype, c2.dtype) == (torch.float32, torch.float32, torch.uint8)
    on_steps = torch.bucketize(on_their_grid(absmax - offset), midpoints(SIGNED)).to(torch.uint8)
    assert torch.equal(on_steps, state.absmax)
    scale = c1.repeat_interleave(BLOCK)[: len(c2)]
    moved = (SIGNED[c2.long()] - SIGNED[state.absmax.long()]).abs() * scale
    widest = float(SIGNED.diff().max())
    assert bool((moved <= widest * scale * (1 + EPS)).all())  # at most one level away
    # What they decode is what we decode from the same bytes.
    theirs_decoded = bitsandbytes.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(double_quant.dequantize(state.absmax, state.state2.absmax, state.offset), theirs_decoded)


def test_double_quantisation_of_a_worked_example() -> None:
    # Mean 2; less it -1, 0, 1: 1 is a level, 0 is a level, -1 has none and takes -(1 - 0.9 / 128).
    absmax = torch.tensor([1.0, 2.0, 3.0])
    c2, c1, offset = double_quant.quantize(absmax)
    assert (c2.tolist(), c1.tolist(), offset.item()) == ([0, 127, 255], [1.0], 2.0)
    assert torch.equal(double_quant.dequantize(c2, c1, offset), torch.tensor([2 - (1 - 0.9 / 128), 2.0, 3.0]))


def test_one_mean_for_all_blocks() -> None:
    absmax = torch.cat([torch.full((256,), 1.0), torch.full((44,), 5.0)])
    _, c1, offset = double_quant.quantize(absmax)
    assert len(c1) == 2
    assert torch.equal(offset, absmax.mean())
    assert torch.equal(c1, torch.stack([offset - 1, 5 - offset]))


def test_every_constant_is_decoded_within_one_level() -> None:
    absmax = torch.rand(3000, generator=torch.Generator().manual_seed(0)) ** 8 + 1e-3  # of very different sizes
    c2, c1, offset = double_quant.quantize(absmax)
    back = double_quant.dequantize(c2, c1, offset)
    bound = float(SIGNED.diff().max()) / 2 * c1.repeat_interleave(BLOCK)[:3000]
    lowest = c2 == 0  # -1 has no level: half a cell more
    assert bool(((back - absmax).abs() <= bound * (1 + lowest.float()) + EPS).all())
    assert bool((back < 0).any())  # SPEC.deviations lists it: small constants among large ones come back negative


def test_bits_per_parameter() -> None:
    numel = 4096 * 4096
    assert double_quant.bits_per_parameter(numel, double=False) == 4.5
    assert double_quant.bits_per_parameter(numel) == 4 + 8 / 64 + 32 / (64 * 256) + 32 / numel
    assert f"{double_quant.bits_per_parameter(numel):.3f}" == "4.127"
    assert double_quant.bits_per_parameter(1, double=False) == 8 + 32
    assert double_quant.bits_per_parameter(65) == (33 * 8 + 2 * 8 + 32 + 32) / 65
    with pytest.raises(ValueError, match="empty"):
        double_quant.bits_per_parameter(0)


@pytest.mark.parametrize("numel", [64 * 300, 7 * 33, 1000 * 63])
@pytest.mark.parametrize("double", [True, False])
def test_bits_equal_those_of_bitsandbytes(numel: int, double: bool) -> None:
    packed, state = bitsandbytes.quantize_4bit(draw(numel), quant_type="nf4", compress_statistics=double)
    stored = [packed, state.absmax, *([state.state2.absmax, state.offset] if double else [])]
    bits = 8 * sum(t.numel() * t.element_size() for t in stored)
    assert double_quant.bits_per_parameter(numel, double=double) == bits / numel
