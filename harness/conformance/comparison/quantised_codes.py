"""Draw values to quantise in blocks, and judge the resulting codes and absmax (the largest magnitude of each block).

Levels are the values that codes stand for. A tie is a value halfway between two neighbouring levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from harness.conformance.comparison.tolerance_policies import Judgement, exact
from harness.conformance.drawing.factors import Block, Factor, Shape
from harness.conformance.normal_noise import normal_noise
from harness.conformance.operation import Arguments
from reference.operations import nf4

Kind = Literal[
    "normal", "levels", "ties", "zeros", "zero-blocks", "scales", "tiny", "huge", "nan", "infinity", "constant"
]
FiniteKind = Literal["normal", "levels", "zeros", "zero-blocks", "scales", "constant"]
"""Kinds of values to quantise. After quantising and decoding, every dtype can hold them: none is infinite or NaN."""
Decoded = Annotated[bool, Factor((False, True))]
UNCOMPARED = -1.0
"""Value that replaces an absmax which is not compared, both in the result and in the reference. A real absmax is never
negative."""


def values(
    kind: Kind, shape: Sequence[int], block: int, levels: Tensor, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Return a tensor to quantise, of `shape` and `dtype`.

    levels: the values that the codes stand for. kind: what the elements are. `levels`: the levels. `ties`: values
    halfway between neighbouring levels. For both of these kinds absmax is 1, so that every division is exact. `scales`:
    blocks of very different magnitudes. `tiny`: values below the smallest normal float32. `huge`: up to the largest
    float32, or that of a narrower `dtype`. `nan` and `infinity`: one such element, in the second block if there is one.
    `constant`: all elements of a block are equal.
    """
    drawn = normal_noise(shape, generator)
    if not drawn.numel():
        return drawn.to(dtype)  # without elements, all kinds are equal
    flat = drawn.flatten()
    numel, number = flat.numel(), torch.arange(flat.numel())
    if kind in ("levels", "ties"):
        ascending = levels.sort().values.float()
        cycle = (ascending if kind == "levels" else (ascending[1:] + ascending[:-1]) / 2).double()
        flat = torch.where(number % block == 0, 1.0, cycle[number % len(cycle)])
    elif kind == "zeros":
        flat = torch.zeros(numel)
    elif kind == "zero-blocks":
        flat = torch.where(number // block % 2 == 1, 0.0, flat)
    elif kind == "scales":
        flat = flat * 10.0 ** (number // block % 6 - 3)
    elif kind == "tiny":
        flat = flat * 3e-40
    elif kind == "huge":
        flat = flat / flat.abs().max() * torch.finfo(dtype if dtype != torch.float64 else torch.float32).max
    elif kind in ("nan", "infinity"):
        flat[min(block, numel - 1)] = torch.inf if kind == "infinity" else torch.nan
    elif kind == "constant":
        flat = flat[number // block * block]
    return flat.view(drawn.shape).to(dtype)


def largest_of_blocks(value: Tensor, block: int) -> Tensor:
    """Return the largest magnitude of every block of `block` elements."""
    blocks = -(-value.numel() // block)
    padded = torch.nn.functional.pad(value.abs(), (0, blocks * block - value.numel()))
    return padded.view(blocks, block).amax(dim=1)


def judge_codes(
    mine: Mapping[str, Tensor],
    want: tuple[Tensor, Tensor],
    near_tie: Callable[[], Tensor],
    block: int,
    levels: Tensor,
) -> tuple[Judgement, str]:
    """Judge `codes` and `absmax` by the reference's. Return the judgement, and text with the number of ties.

    Two codes with the same value count as equal: FP4's 0 and 8 are both zero. For an element near a tie, the
    neighbouring code is right too. near_tie: function that returns the mask of these elements. It is called only if a
    code differs by one, because it takes longer than the rest. A block of zeros may have any codes and absmax that
    decode to zeros. A block with NaN or infinity may have any codes, if its absmax is not finite. bitsandbytes' back
    ends differ for such blocks.
    """
    codes, absmax = want
    levels = levels.to(codes.device)
    if mine["codes"].shape != codes.shape or mine["absmax"].shape != absmax.shape:
        return exact(mine, {"codes": codes, "absmax": absmax}), ""
    rank = torch.unique(levels, return_inverse=True)[1]
    distance = (rank[mine["codes"].long()] - rank[codes.long()]).abs()
    neighbours = distance == 1
    tied = near_tie() & neighbours if bool(neighbours.any()) else neighbours
    decoded = levels[mine["codes"].long()] * mine["absmax"].repeat_interleave(block)[: codes.numel()]
    vanishes = (absmax == 0) & (largest_of_blocks(decoded, block) <= torch.finfo(torch.float32).tiny)
    nonfinite = ~absmax.isfinite() & ~mine["absmax"].isfinite()
    meaningless = (vanishes | nonfinite).repeat_interleave(block)[: codes.numel()]
    have = {
        "codes": torch.where((distance == 0) | tied | meaningless, codes, mine["codes"]),
        "absmax": torch.where(vanishes | nonfinite, UNCOMPARED, mine["absmax"]),
    }
    expected = {"codes": codes, "absmax": torch.where(vanishes | ~absmax.isfinite(), UNCOMPARED, absmax)}
    return exact(have, expected), f"{int(tied.sum())} codes on the other side of a tie"


class FourBit:
    """Arguments, references and judgements of the two Operations on a 4-bit format: quantise and decode.

    form: module of the format, reference.operations.nf4 or fp4.
    """

    def __init__(self, form: Any) -> None:
        self.form = form

    def arguments(
        self, dtype: torch.dtype, generator: torch.Generator, *, shape: Shape, block: Block, kind: Kind = "normal"
    ) -> Arguments:
        """Return random arguments for quantising a tensor.

        kind: what its elements are. `levels`: the values of the codes. `ties`: values halfway between them. `scales`:
        blocks of very different magnitudes. `tiny`: numbers near 3e-40. `huge`: up to the largest number of the dtype.
        `nan`, `infinity`: one such element among normal numbers. `zeros` and `zero-blocks`: every element is 0, or every
        element of every second block. `constant`: all elements of a block are equal.
        """
        return {"W": values(kind, shape, block, self.form.codebook(), dtype, generator), "block": block}

    def quantize(self, W: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """Quantise W and return (packed, absmax).

        Each byte of `packed` holds two codes, the first in the high nibble. `absmax` has one float32 for each block.
        """
        codes, absmax = self.form.quantize(W, block)
        return self.form.pack(codes), absmax

    def judge(self, outputs: Mapping[str, Tensor], arguments: Arguments) -> tuple[Judgement, str]:
        """Judge every packed byte and absmax. Return the judgement, and text with the number of ties.

        If the number of elements is odd, the last byte also holds a code that stands for 0. It counts as an element of
        the last block.
        """
        W, block = arguments["W"], arguments["block"]
        packed, absmax = self.quantize(W, block)
        if outputs["packed"].shape != packed.shape:
            return exact(outputs, {"packed": packed, "absmax": absmax}), ""
        held = 2 * packed.numel()
        codes = nf4.unpack(packed, held)
        mine = {"codes": nf4.unpack(outputs["packed"], held), "absmax": outputs["absmax"]}

        def near_tie() -> Tensor:
            return torch.nn.functional.pad(self.form.near_tie(W, block), (0, held - W.numel()))

        return judge_codes(mine, (codes, absmax), near_tie, block, self.form.codebook())

    def packed_arguments(
        self,
        dtype: torch.dtype,
        generator: torch.Generator,
        *,
        shape: Shape,
        block: Block,
        kind: FiniteKind = "normal",
        decoded: Decoded = False,
    ) -> Arguments:
        """Return random arguments for decoding a packed weight. If the weight has enough elements, every code occurs.

        decoded: whether every seventh absmax is small and negative, as double quantisation may decode a small absmax.
        """
        given = self.arguments(torch.float32, generator, shape=shape, block=block, kind=kind)
        packed, absmax = self.quantize(**given)
        if decoded:
            absmax[::7] *= -0.1
        return {"packed": packed, "absmax": absmax, "block": block, "shape": tuple(shape), "dtype": dtype}

    def dequantize(
        self, packed: Tensor, absmax: Tensor, block: int, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """Decode a packed weight, and return it as a tensor of `shape` and `dtype`.

        Each element is the level of its code times the absmax of its block, computed in float32.
        """
        numel = torch.Size(shape).numel()
        flat: Tensor = self.form.dequantize(nf4.unpack(packed, numel), absmax, block)
        return flat.view(tuple(shape)).to(dtype)
