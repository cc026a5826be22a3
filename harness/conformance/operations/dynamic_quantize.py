"""dynamic_quantize: quantises a tensor in blocks to 8-bit dynamic codes, as for optimizer states and absmax."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from harness.conformance.comparison.quantised_codes import Kind, judge_codes, values
from harness.conformance.comparison.tolerance_policies import Judgement
from harness.conformance.drawing.factors import Numel
from harness.conformance.operation import Arguments, Operation
from reference.operations import nf4
from reference.operations.dynamic_map import dynamic_map, quantize_blockwise

Block = Literal[256, 64, 128, 512, 1024, 2048, 4096]
_COLUMNS = 64


def arguments(
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    numel: Numel,
    block: Block = 256,
    signed: bool = True,
    kind: Kind = "normal",
) -> Arguments:
    """Draw a tensor to quantise. If `signed` is False, no element is negative. kind: as for
    `nf4_quantize`, whose `explain` lists them.

    If `numel` is a multiple of 64, the tensor has 64 columns, like the state of a weight.
    """
    shape = [numel // _COLUMNS, _COLUMNS] if numel % _COLUMNS == 0 else [numel]
    x = values(kind, shape, block, dynamic_map(signed), dtype, generator)
    return {"x": x if signed else x.abs(), "block": block, "signed": signed}


def reference(x: Tensor, block: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Return (codes, absmax): uint8 (numel,) in the order of x.flatten(), and one float32 for each block."""
    return quantize_blockwise(x, dynamic_map(signed), block)


def judge(outputs: Mapping[str, Tensor], given: Arguments) -> tuple[Judgement, str]:
    """Judge the codes and the absmax. A code must stand for the nearest level. If rounding decides which of two levels is
    nearer, both are right.
    """
    x, block, levels = given["x"], given["block"], dynamic_map(given["signed"])
    return judge_codes(outputs, reference(**given), lambda: nf4.near_tie(x, block, levels), block, levels)


OPERATION = Operation("dynamic_quantize", ("codes", "absmax"), arguments, reference, judge=judge)
