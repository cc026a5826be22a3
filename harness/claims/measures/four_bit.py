"""Measures: the values (levels) of 4-bit types, and the errors of these types on weights from a normal distribution.

Each block of weights has a constant, by which its 4-bit values are multiplied. NF4, FP4 and the 8-bit type of these
constants come from the references.
"""

from __future__ import annotations

from itertools import pairwise
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

from harness.claims.measure import MeasureResult, Positive, measure

if TYPE_CHECKING:
    from torch import Tensor

Type = Literal["nf4", "fp4", "e2m1", "e3m0", "int4", "int4-both-ends"]
"""A 4-bit type. `fp4` is bitsandbytes' float. `e2m1` and `e3m0` are floats with as many bits of exponent (e) and
mantissa (m) as the name says. `int4` has the values -7 .. 7 divided by 7, like the QLoRA paper's eq. 1 for 8 bits.
`int4-both-ends` has the values -8 .. 7 divided by 8."""
_DRAWN = 2**18
"""Number of weights that are drawn from a normal distribution to measure an error. With so many, the error of NF4 is
known to a third of a percent."""


@measure("count")
def levels(type: Type, side: Literal["both", "negative", "positive"] = "both", zero: bool = True) -> MeasureResult:
    """Number of different values (levels) of a 4-bit type.

    side: count the levels on one or both sides of zero. zero: whether to include zero itself.
    """
    values = _levels(type).unique()
    chosen = {"both": values.isfinite(), "negative": values <= 0, "positive": values >= 0}[side]
    found = values[chosen & ((values != 0) | zero)].tolist()
    return MeasureResult(len(found), f"levels from {found[0]:.6g} to {found[-1]:.6g}" if found else "no levels")


@measure("property")
def nf4_has(printed: list[float]) -> MeasureResult:
    """Check whether the levels of NF4 equal the printed levels in every bit of float32.

    The reference computes the levels from quantiles.
    """
    import torch

    return _same(torch.tensor(printed), _levels("nf4"))


@measure("property")
def equation_4_gives(printed: list[float], ends: Literal["as printed", "left out"] = "as printed") -> MeasureResult:
    """Check whether the levels of the QLoRA paper's eq. 4, divided by the largest magnitude, are the printed levels.

    Eq. 4 is q_i = (Q(i / (2^k + 1)) + Q((i + 1) / (2^k + 1))) / 2, where Q is the quantile function of the normal
    distribution. ends: whether infinite levels are kept (`as printed`) or left out.
    """
    import torch

    number = len(printed) + 1
    # NormalDist has no quantile of 0.
    quantiles = [-float("inf"), *(NormalDist().inv_cdf(i / number) for i in range(1, number))]
    q = torch.tensor([(low + high) / 2 for low, high in pairwise(quantiles)])
    if ends == "as printed" and not q.isfinite().all():
        where = ", ".join(f"q_{i} = {q[i]:g}" for i in range(len(q)) if not q[i].isfinite())
        return MeasureResult(False, f"{where}, since Q(0) is minus infinity")
    q = q[q.isfinite()]
    return _same(q / q.abs().max(), torch.tensor(printed))


@measure("property")
def equally_full_bins(type: Type, block: Positive = 64) -> MeasureResult:
    """Check whether each level of a 4-bit type gets an equal share of normally distributed weights.

    A deviation by 5 standard errors of the sample is allowed. block: number of weights that share a quantisation
    constant.
    """
    from harness.conformance.tolerance_constants import INITIAL_SIGMAS

    table = _levels(type).unique()
    codes, _ = _quantised(_normal(), table, block)
    counts = codes.long().bincount(minlength=len(table)).double()
    equal = 1 / len(table)
    allowed = INITIAL_SIGMAS * (equal * (1 - equal) / codes.numel()) ** 0.5
    shares = counts / codes.numel()
    least, most = int(shares.argmin()), int(shares.argmax())
    ends = f"{shares[least]:.2%} have the level {table[least]:.4g}, {shares[most]:.2%} the level {table[most]:.4g}"
    how = f"of {codes.numel():,} weights {ends}; equal shares are {equal:.2%}"
    return MeasureResult(bool(((shares - equal).abs() <= allowed).all()), how)


@measure("number")
def squared_error(type: Type, block: Positive = 64, double: bool = False) -> MeasureResult:
    """Mean squared error of weights from a standard normal distribution, if they are stored in a 4-bit type.

    The 2^18 weights are drawn with seed 0. type: `nf4`; `fp4`, which is bitsandbytes' float; `e2m1` or `e3m0`, floats
    with as many bits of exponent (e) and mantissa (m) as the name says; `int4` (-7 .. 7); or `int4-both-ends` (-8 ..
    7). block: number of weights that share a quantisation constant. double: whether the constants are stored in 8 bits.
    """
    from reference.operations import double_quant
    from reference.operations.dynamic_map import dequantize_blockwise

    weights, table = _normal(), _levels(type).unique()
    codes, absmax = _quantised(weights, table, block)
    if double:
        absmax = double_quant.dequantize(*double_quant.quantize(absmax))
    error = dequantize_blockwise(codes, absmax, table, block).double() - weights.double()
    found, constants = float(error.square().mean()), ", constants in 8 bits" * double
    return MeasureResult(found, f"{type}, block {block}{constants}: mean squared error {found:.6g}")


@measure("number")
def constants_error(centred: bool = True, block: Positive = 64) -> MeasureResult:
    """Mean relative error of block constants, if they are stored in 8 bits.

    A block constant is the largest magnitude among `block` normally distributed weights. centred: whether the mean of
    the constants is subtracted first.
    """
    from reference.operations import double_quant
    from reference.operations.dynamic_map import dequantize_blockwise, dynamic_map, quantize_blockwise

    _, absmax = _quantised(_normal(), _levels("nf4"), block)
    if centred:
        back = double_quant.dequantize(*double_quant.quantize(absmax))
    else:
        table = dynamic_map(signed=True)
        back = dequantize_blockwise(*quantize_blockwise(absmax, table, double_quant.BLOCK), table, double_quant.BLOCK)
    found = float(((back - absmax).abs() / absmax).double().mean())
    return MeasureResult(
        found, f"{'with' if centred else 'without'} subtracting the mean: mean relative error {found:.4%}"
    )


@measure("property")
def constants_are(type: Literal["e4m3", "e5m2"]) -> MeasureResult:
    """Check whether the 8-bit type of the block constants is the float format `type`, scaled to the largest value 1."""
    import torch

    from reference.operations.dynamic_map import dynamic_map

    table = dynamic_map(signed=True)
    format_ = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[type]
    floats = torch.arange(256, dtype=torch.uint8).view(format_).float()
    floats = floats[floats.isfinite()]
    floats = (floats / floats.max()).unique()
    shared = int(torch.isin(table, floats).sum())
    how = f"{shared} of the {len(table)} values of the constants are among the {len(floats)} of {type}"
    return MeasureResult(shared == len(table) == len(floats), how)


@measure("property")
def blocks_run_over_rows(rows: Positive, columns: Positive, block: Positive = 64) -> MeasureResult:
    """Check whether the blocks of a quantised matrix continue from one row to the next.

    If they do, each block constant is the largest magnitude in a run of `block` elements of the flattened matrix.
    """
    from reference.operations import nf4

    weights = _normal()[: rows * columns].view(rows, columns)
    _, absmax = nf4.quantize(weights, block)
    runs = [float(run.abs().max()) for run in weights.flatten().split(block)]
    by_row = rows * -(-columns // block)
    how = f"{absmax.numel()} constants; {len(runs)} runs of {block} in the flattened matrix, {by_row} row by row"
    return MeasureResult(absmax.tolist() == runs, how)


def _levels(type: Type) -> Tensor:
    """Return the float32 levels of a type in the order of their codes, scaled so that the largest magnitude is 1."""
    import torch

    from reference.operations import fp4, nf4

    whole = torch.arange(-8.0, 8.0)
    tables = {
        "nf4": nf4.codebook,
        "fp4": fp4.codebook,
        "e2m1": lambda: _float(exponent=2, mantissa=1),
        "e3m0": lambda: _float(exponent=3, mantissa=0),
        "int4": lambda: whole[1:] / 7,
        "int4-both-ends": lambda: whole / 8,
    }
    return tables[type]()


def _float(exponent: int, mantissa: int) -> Tensor:
    """Return all numbers of a floating-point format with this many exponent and mantissa bits, divided by the largest.

    The format has a sign bit and subnormal numbers, but no infinities.
    """
    import torch

    E, m = torch.meshgrid(torch.arange(2.0**exponent), torch.arange(2.0**mantissa), indexing="ij")
    fraction = m / 2**mantissa
    magnitudes = torch.where(E == 0, fraction, (1 + fraction) * 2 ** (E - 1)).flatten()
    magnitudes = magnitudes / magnitudes.max()
    return torch.cat([magnitudes, -magnitudes])


def _normal() -> Tensor:
    import torch

    return torch.randn(_DRAWN, generator=torch.Generator().manual_seed(0))


def _quantised(weights: Tensor, table: Tensor, block: int) -> tuple[Tensor, Tensor]:
    from reference.operations.dynamic_map import quantize_blockwise

    return quantize_blockwise(weights, table, block)


def _same(have: Tensor, want: Tensor) -> MeasureResult:
    import torch

    if len(have) != len(want):
        ends = ", ".join(f"{value:.4g}" for value in have.tolist())
        return MeasureResult(False, f"{len(have)} levels instead of {len(want)}: {ends}")
    difference = float((have - want).abs().max())
    return MeasureResult(torch.equal(have, want), f"{len(have)} levels, largest difference {difference:.3g}")
