"""Double quantisation: the block constants of a 4-bit weight in 8 bits. QLoRA section 3, arXiv:2305.14314. An Operation.

The absmax of every 4-bit block (c2, float32) less one mean is quantised in blocks of 256 to 8 bits, each with a float32
constant (c1) of its own: 0.127 bits a parameter in the place of 0.5.
"""

from __future__ import annotations

from torch import Tensor

from reference.operations.dynamic_map import dequantize_blockwise, dynamic_map, quantize_blockwise
from reference.spec import Deviation, ReferenceSpec

SPEC = ReferenceSpec(
    paper="arXiv:2305.14314v1, section 3, Double Quantization; bitsandbytes, which says what the 8-bit type is",
    deviations=(
        Deviation(
            topic="the 8-bit type",
            paper="8-bit floats (c2 is written FP8)",
            here="the signed dynamic map, which is no FP8",
            why="bitsandbytes, the authors' own quantiser; torchao has int8 on a linear grid",
        ),
        Deviation(
            topic="the mean",
            paper="subtracted before quantisation; eq. 6 does not add it back, nor does the paper count its bits",
            here="one mean of all constants of a tensor, float32, kept and added back",
            why="without it the weights would be wrong; bitsandbytes keeps it as `offset`",
        ),
        Deviation(
            topic="a constant may come back negative",
            paper="not mentioned",
            here=(
                "left as it is: a small absmax in a block of 256 with a large one may dequantise below zero, and flips "
                "signs"
            ),
            why="as in bitsandbytes; the error is bounded by the map's step, times c1",
        ),
    ),
)
BLOCK = 256


def quantize(absmax: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor, Tensor]:
    """Return (c2, c1, offset): uint8 codes as long as `absmax`, float32 constants of each block, float32 mean (0-d).

    absmax: float32, 1-d and not empty. A NaN or an infinity in it makes the offset, and so everything, not finite.
    """
    flat = absmax.detach().flatten().float()
    offset = flat.mean()
    codes, constants = quantize_blockwise(flat - offset, dynamic_map(signed=True), block)
    return codes, constants, offset


def dequantize(c2: Tensor, c1: Tensor, offset: Tensor, block: int = BLOCK) -> Tensor:
    """Return the constants (float32, as long as `c2`): dequant(c1, c2) of eq. 6, and the mean added back."""
    return dequantize_blockwise(c2, c1, dynamic_map(signed=True), block) + offset.float()


def bits_per_parameter(numel: int, block: int = 64, double: bool = True, second_block: int = BLOCK) -> float:
    """Return the bits that a 4-bit weight of `numel` elements takes, divided by `numel`.

    Counted: packed codes, whole bytes; without double quantisation 32 bits for each block; with it 8 for each block, 32
    for each second block and 32 for the mean. Code tables are not: they are constants of the type. Raises ValueError for
    an empty weight.
    """
    if numel < 1:
        raise ValueError("an empty weight has no bits per parameter")
    blocks = -(-numel // block)
    codes = 8 * -(-numel // 2)
    constants = 8 * blocks + 32 * -(-blocks // second_block) + 32 if double else 32 * blocks
    return (codes + constants) / numel
