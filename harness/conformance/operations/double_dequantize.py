"""double_dequantize: decodes the absmax of 4-bit blocks from 8-bit codes and a mean."""

from __future__ import annotations

from typing import Any

import torch

from harness.conformance.operation import Arguments, Operation
from harness.conformance.operations import double_quantize
from harness.conformance.operations.double_quantize import Blocks, SecondBlock, Spread
from reference.operations import double_quant


def arguments(
    dtype: torch.dtype, generator: torch.Generator, *, blocks: Blocks, block: SecondBlock = 256, spread: Spread = 1.0
) -> Arguments:
    """Draw the absmax of 4-bit blocks, quantised to 8-bit codes."""
    given = double_quantize.arguments(dtype, generator, blocks=blocks, block=block, spread=spread)
    codes, absmax2, offset = double_quant.quantize(**given)
    return {"codes": codes, "absmax2": absmax2, "offset": offset, "block": block}


def reference(codes: Any, absmax2: Any, offset: Any, block: int) -> Any:
    """Return the decoded absmax: value of each code x `absmax2` of its block + the mean `offset` (arXiv:2305.14314, eq.
    6).
    """
    return double_quant.dequantize(codes, absmax2, offset, block)


OPERATION = Operation("double_dequantize", ("absmax",), arguments, reference)
