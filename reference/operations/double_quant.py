"""Double quantisation: the block constants of a 4-bit weight in 8 bits. QLoRA section 3, arXiv:2305.14314. An Operation.

Each block of a 4-bit weight has a constant, its float32 absmax. The mean of these constants is subtracted from each,
and the differences are quantised to 8-bit codes (c2). Each block of 256 differences has one float32 constant (c1). All
constants of a weight then take 0.127 bits per parameter instead of 0.5.
"""

from __future__ import annotations

from torch import Tensor

from reference.operations.dynamic_map import dequantize_blockwise, dynamic_map, quantize_blockwise
from reference.spec import Deviation, ReferenceSpec

SPEC = ReferenceSpec(
    paper="arXiv:2305.14314v1, section 3, Double Quantization; the 8-bit type is bitsandbytes'",
    deviations=(
        Deviation(
            topic="the 8-bit type",
            paper="8-bit floats (c2 is written FP8)",
            here="the signed dynamic map, which is no FP8",
            why="bitsandbytes, the authors' quantiser, uses it; torchao has int8 on a linear grid",
        ),
        Deviation(
            topic="the mean",
            paper="subtracted before quantisation; eq. 6 does not add it back, and the paper does not count its bits",
            here="one mean of all constants of a tensor, float32, stored and added back",
            why="without it the weights would be wrong; bitsandbytes stores it as `offset`",
        ),
        Deviation(
            topic="negative constants",
            paper="not mentioned",
            here="not prevented: a small absmax in a block of 256 with a large one may be decoded to a negative "
            "number, which flips signs",
            why="bitsandbytes does the same; the error is at most the map's step times c1",
        ),
    ),
)
BLOCK = 256


def quantize(absmax: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor, Tensor]:
    """Return (c2, c1, offset) for the constants `absmax` (float32, 1-d, not empty) of a 4-bit weight.

    c2: one uint8 code per constant. c1: one float32 number per block of codes. offset: the float32 mean of `absmax`,
    0-d. If `absmax` holds a NaN or an infinity, no decoded result is finite.
    """
    flat = absmax.detach().flatten().float()
    offset = flat.mean()
    codes, constants = quantize_blockwise(flat - offset, dynamic_map(signed=True), block)
    return codes, constants, offset


def dequantize(c2: Tensor, c1: Tensor, offset: Tensor, block: int = BLOCK) -> Tensor:
    """Return the decoded constants of a 4-bit weight, float32: dequant(c1, c2) of eq. 6 plus `offset`.

    The result is as long as `c2`.
    """
    return dequantize_blockwise(c2, c1, dynamic_map(signed=True), block) + offset.float()


def bits_per_parameter(numel: int, block: int = 64, double: bool = True, second_block: int = BLOCK) -> float:
    """Return the stored bits of a 4-bit weight, divided by its number of elements `numel`.

    block: elements per constant. second_block: constants that share a second constant. The codes take whole bytes.
    Without double quantisation, each constant takes 32 bits. With it, each constant takes 8 bits, each second constant
    32, and the mean 32. Code tables are not included, because they are the same for all weights. Raises ValueError for
    an empty weight.
    """
    if numel < 1:
        raise ValueError("an empty weight has no bits per parameter")
    blocks = -(-numel // block)
    codes = 8 * -(-numel // 2)
    constants = 8 * blocks + 32 * -(-blocks // second_block) + 32 if double else 32 * blocks
    return (codes + constants) / numel
