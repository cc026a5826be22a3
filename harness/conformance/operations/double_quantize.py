"""double_quantize: subtracts the mean from the absmax of 4-bit blocks and quantises the rest to 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from torch import Tensor

from harness.conformance.comparison.quantised_codes import judge_codes
from harness.conformance.comparison.tolerance_policies import Judgement, noise_floor, worst_of
from harness.conformance.drawing.factors import Factor
from harness.conformance.operation import Arguments, Operation, draw
from reference.operations import double_quant, nf4
from reference.operations.dynamic_map import dynamic_map, quantize_blockwise

Blocks = Annotated[int, Factor((256, 1, 257, 1000, 4096), (10_000,), least=1, most=20_000)]
Spread = Annotated[float, Factor((1.0, 0.0, 0.05, 2.0), least=0.0, most=3.0)]

SecondBlock = Literal[256, 64, 128, 512, 1024]
"""Number of absmax values that share one scale (`absmax2`) when they are quantised to 8 bits. QLoRA has 256."""


def arguments(
    dtype: torch.dtype, generator: torch.Generator, *, blocks: Blocks, block: SecondBlock = 256, spread: Spread = 1.0
) -> Arguments:
    """Draw an absmax for each block of a weight: 10^z, where z is normal with standard deviation `spread`."""
    return {"absmax": 10.0 ** draw(generator, dtype, blocks, spread=spread), "block": block}


def judge(outputs: Mapping[str, Tensor], given: Arguments) -> tuple[Judgement, str]:
    """Judge the mean `offset` by `noise_floor`. Compare the codes with the reference's codes for the same `offset`."""
    absmax, block, levels = given["absmax"], given["block"], dynamic_map(signed=True)
    truth, rounded = {"offset": absmax.double().mean()}, {"offset": absmax.mean()}
    mean = noise_floor({"offset": outputs["offset"]}, truth, rounded, "float32")
    centred = absmax - outputs["offset"]
    mine = {"codes": outputs["codes"], "absmax": outputs["absmax2"]}
    want = quantize_blockwise(centred, levels, block)
    codes, detail = judge_codes(mine, want, lambda: nf4.near_tie(centred, block, levels), block, levels)
    return worst_of([mean, codes], "exact, given the offset"), detail


OPERATION = Operation(
    name="double_quantize",
    outputs=("codes", "absmax2", "offset"),
    arguments=arguments,
    reference=double_quant.quantize,
    judge=judge,
)
