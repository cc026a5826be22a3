"""NF4 and FP4 codes and absmax against bitsandbytes' on the CPU: everything equal, or in the list below with its reason."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from bitsandbytes import functional as bitsandbytes
from torch import Tensor

from reference.operations import fp4, nf4

KINDS: dict[str, Any] = {"nf4": nf4, "fp4": fp4}
kinds = pytest.mark.parametrize("kind", KINDS)
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
INF, NAN = float("inf"), float("nan")
MILLION = 1_000_003


class Difference(NamedTuple):
    """How many codes, absmax and decoded values differ from bitsandbytes' (0.50.2, CPU), and why."""

    codes: int
    absmax: int
    values: int
    why: str


FLOOR = "bitsandbytes takes absmax as at least 1e-38 before it divides: smaller blocks lose their largest elements"
TAIL = "in the last block, if it is short, bitsandbytes also stores that 1e-38 as its absmax"
ZEROS = (
    "bitsandbytes' CPU code gives a positive that vanishes code 8 (minus zero), a negative one code 0; we, the sign's"
)
DOWN = (
    "bitsandbytes' CPU code gives a negative tie the larger magnitude; its CUDA and Triton kernels and we, the smaller"
)
DIFFERENCES = {
    ("nf4", "zeros, short block"): Difference(0, 1, 0, TAIL),
    ("nf4", "vanishing beside one"): Difference(1, 1, 1, f"{FLOOR}; {TAIL}"),
    ("nf4", "absmax 5e-39"): Difference(60, 0, 60, FLOOR),
    ("nf4", "absmax 5e-39, short block"): Difference(59, 1, 61, f"{FLOOR}; {TAIL}"),
    ("nf4", "absmax 1e-44"): Difference(60, 0, 60, FLOOR),
    ("nf4", "bfloat16, subnormal"): Difference(58, 0, 58, FLOOR),
    ("fp4", "ties, absmax 1"): Difference(8, 0, 7, f"{DOWN}; {ZEROS}"),
    ("fp4", "ties, absmax 2^-20"): Difference(8, 0, 7, f"{DOWN}; {ZEROS}"),
    ("fp4", "ties, absmax 3"): Difference(5, 0, 4, f"{DOWN}; {ZEROS}"),
    ("fp4", "just above ties"): Difference(2, 0, 0, ZEROS),
    ("fp4", "just below ties"): Difference(2, 0, 0, ZEROS),
    ("fp4", "zeros, short block"): Difference(0, 1, 0, TAIL),
    ("fp4", "vanishing beside one"): Difference(190, 1, 1, f"{ZEROS}; {FLOOR}; {TAIL}"),
    ("fp4", "absmax 5e-39"): Difference(54, 0, 54, FLOOR),
    ("fp4", "absmax 5e-39, short block"): Difference(53, 1, 18, f"{FLOOR}; {TAIL}"),
    ("fp4", "absmax 1e-44"): Difference(60, 0, 60, FLOOR),
    ("fp4", "bfloat16, subnormal"): Difference(54, 0, 54, FLOOR),
}


def special(kind: str) -> dict[str, Tensor]:
    """Map names to inputs; a block is 64."""
    levels = KINDS[kind].codebook().sort().values
    ties = torch.cat([torch.ones(1), (levels[:-1] + levels[1:]) / 2])
    steps = torch.linspace(-1, 1, 64)
    float16 = torch.finfo(torch.float16)
    bfloat16 = torch.finfo(torch.bfloat16)
    return {
        "ties, absmax 1": ties,
        "ties, absmax 2^-20": ties * 2.0**-20,
        "ties, absmax 3": ties * 3,
        "just above ties": torch.cat([torch.ones(1), torch.nextafter(ties[1:], torch.tensor(INF))]),
        "just below ties": torch.cat([torch.ones(1), torch.nextafter(ties[1:], torch.tensor(-INF))]),
        "nothing": torch.zeros(0),
        "one": torch.tensor([-2.5]),
        "zeros, whole block": torch.zeros(64),
        "zeros, whole block between others": torch.cat([steps, torch.zeros(64), steps]),
        "zeros, short block": torch.cat([steps, torch.zeros(3)]),
        "minus zeros": torch.cat([torch.ones(1), -torch.zeros(63)]),
        "odd length": steps[:63],
        "one more than a block": torch.cat([steps, steps[:1]]),
        "vanishing beside one": torch.cat([torch.ones(1), steps * 1e-4, steps * 1e-30, steps * 1e-40]),
        "absmax 1.2e-38, the least normal": steps * 1.2e-38,
        "absmax 5e-39": steps * 5e-39,
        "absmax 5e-39, short block": steps[:63] * 5e-39,
        "absmax 1e-44": steps * 1e-44,
        "huge": steps * torch.finfo(torch.float32).max,
        "huge, short block": steps[:63] * torch.finfo(torch.float32).max,
        "infinity": torch.cat([torch.tensor([INF, -INF, 1.0, -1.0, 0.0]), steps]),
        "NaN": torch.cat([torch.tensor([NAN, 1.0, -1.0, 0.0]), steps, torch.ones(64)]),
        "float16": (steps * float16.max).half(),
        "float16, subnormal": (steps * float16.tiny / 2).half(),
        "bfloat16": (steps * bfloat16.max).bfloat16(),
        "bfloat16, subnormal": (steps * bfloat16.tiny / 2).bfloat16(),
    }


def theirs(kind: str, W: Tensor, block: int) -> tuple[Tensor, Tensor]:
    packed, state = bitsandbytes.quantize_4bit(W, blocksize=block, quant_type=kind, compress_statistics=False)
    return packed.flatten(), state.absmax


def compare(kind: str, W: Tensor, block: int = 64) -> tuple[tuple[int, int, int], Tensor]:
    """Return how many codes, absmax and decoded values differ, and the mask of the codes that do."""
    ours = KINDS[kind]
    codes, absmax = ours.quantize(W, block)
    packed, their_absmax = theirs(kind, W, block)
    their_codes = nf4.unpack(packed, W.numel())
    differ = codes != their_codes
    if not bool(differ.any()):
        assert torch.equal(ours.pack(codes), packed)
    assert len(absmax) == len(their_absmax) == -(-W.numel() // block)
    values = (ours.dequantize(c, a, block) for c, a in ((codes, absmax), (their_codes, their_absmax)))
    same_values, same_absmax = same(*values), same(absmax, their_absmax)
    return (int(differ.sum()), int((~same_absmax).sum()), int((~same_values).sum())), differ


def same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def draw(numel: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype)


CASES = [(kind, name) for kind in KINDS for name in special(kind)]


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{kind}: {name}" for kind, name in CASES])
def test_special_cases_are_bitsandbytes_or_listed(kind: str, name: str) -> None:
    counted, _ = compare(kind, special(kind)[name])
    listed = DIFFERENCES.get((kind, name), Difference(0, 0, 0, ""))
    assert counted == listed[:3], listed.why
    assert any(listed[:3]) == bool(listed.why)


def test_every_listed_case_occurs() -> None:
    assert set(DIFFERENCES) <= set(CASES)


def scaled(W: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return W / absmax in float64, and whether the division is exact in float32 too: absmax is a power of two."""
    flat = W.flatten().double()
    absmax = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block).abs().amax(1)
    exact = (torch.frexp(absmax).mantissa == 0.5).repeat_interleave(block)[: flat.numel()]
    return flat / absmax.repeat_interleave(block)[: flat.numel()], exact


def listed_for_random(kind: str, W: Tensor, block: int) -> Tensor:
    """Return the mask of elements whose codes must differ: none of NF4; the signs of zeros and negative ties of FP4."""
    if kind == "nf4":
        return torch.zeros(W.numel(), dtype=torch.bool)
    x, exact = scaled(W, block)
    magnitudes = fp4.codebook()[:8].sort().values
    midpoints = (magnitudes[:-1] + magnitudes[1:]) / 2
    vanishes = (x != 0) & (x.abs() <= midpoints[0])
    return vanishes | ((x < 0) & exact & torch.isin(x.abs(), midpoints.double()))


@kinds
def test_a_million_random_values(kind: str) -> None:
    W = draw(MILLION, 0)
    counted, differ = compare(kind, W)
    listed = listed_for_random(kind, W, 64)
    assert torch.equal(differ, listed)  # NF4: not one; FP4: about 5 in a thousand, every one of which decodes the same
    assert counted == (int(listed.sum()), 0, 0)
    assert (kind == "nf4") == (not bool(listed.any()))


@kinds
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_block_size_and_dtype(kind: str, block: int, dtype: torch.dtype) -> None:
    W = draw(30_011, block, dtype)  # a prime: the last block is short
    counted, differ = compare(kind, W, block)
    listed = listed_for_random(kind, W, block)
    excused = KINDS[kind].near_tie(W, block)
    assert torch.equal(differ | excused, listed | excused)
    assert counted[1] == 0


@kinds
@pytest.mark.parametrize("scale", [1e-30, 1.0, 3e38])
def test_only_near_ties_are_decided_by_rounding(kind: str, scale: float) -> None:
    levels = KINDS[kind].codebook().sort().values
    midpoints = ((levels[:-1] + levels[1:]) / 2).double()
    midpoints = midpoints[midpoints > 0] if kind == "fp4" else midpoints
    absmax = (torch.rand(2000, generator=torch.Generator().manual_seed(1)) / 2 + 0.5) * scale
    near = (midpoints * absmax.double()[:, None]).float()  # midpoints, rounded: as near as float32 comes
    W = torch.cat([absmax[:, None], near, torch.nextafter(near, 2 * near), torch.nextafter(near, 0 * near)], dim=1)
    W = torch.nn.functional.pad(W, (0, 64 - W.shape[1]))
    assert bool(W.isfinite().all())
    _, differ = compare(kind, W)
    assert not bool((differ & ~KINDS[kind].near_tie(W)).any())
    assert bool(differ.any())  # both roundings are seen, or the test is blind
