"""Measure at which sizes the fused kernel of a packed weight is faster than decoding first. Needs Triton."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from harness.bench.timing import Clock, pairs

WEIGHTS = {
    "cuda": ((1024, 4096), (4096, 4096), (10240, 5120), (14336, 4096), (28672, 8192)),
    "cpu": ((64, 64), (128, 64)),
}
"""Device -> (E, D) of the weights: those of Llama 3 and between them. On a CPU the interpreter runs the kernels, so small
weights rehearse the measurement, and the times mean nothing."""
TOKENS = {"cuda": (1, 8, 16, 32, 64, 128, 256), "cpu": (1, 16)}
BLOCK = 64
PAIRS = {"cuda": 11, "cpu": 5}


def measure(clock: Clock) -> Iterator[dict[str, Any]]:
    """Yield the median seconds of both ways for each weight and number of tokens. The weights are random."""
    from harness.kernels.triton import nf4_linear
    from harness.kernels.triton.nf4 import dequantize, quantize

    kind, dtype = clock.device.type, torch.bfloat16 if clock.on_gpu else torch.float16
    for E, D in WEIGHTS[kind]:
        packed, absmax = quantize(torch.randn(E, D, device=clock.device), BLOCK)
        for tokens in TOKENS[kind]:
            x = torch.randn(tokens, D, device=clock.device, dtype=dtype)
            fused = partial(nf4_linear.fused, x, packed, absmax, BLOCK, (E, D), None)

            def decoded(
                x: Tensor = x, packed: Tensor = packed, absmax: Tensor = absmax, E: int = E, D: int = D
            ) -> None:
                linear(x, dequantize(packed, absmax, BLOCK, (E, D), x.dtype))

            found = pairs(clock, fused, decoded, PAIRS[kind], single=True)
            yield {
                "operation": "nf4_linear", "E": E, "D": D, "tokens": tokens, "fused_s": median(found.ours),
                "decoded_s": median(found.other),
            }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the table that `harness.kernels.crossover` reads, from the rows of `measure`.

    For each weight: the largest measured number of tokens up to which the fused kernel is always faster. 0 means none.
    """
    found = []
    for E in dict.fromkeys(row["E"] for row in rows):
        most = 0
        for row in (one for one in rows if one["E"] == E):
            if row["fused_s"] >= row["decoded_s"]:
                break
            most = row["tokens"]
        found.append({"E": E, "tokens": most})
    return {
        "nf4_linear": {"standing": "measured by `peft-harness bench --crossovers`", "rows": found, "times": list(rows)}
    }


def triton_version() -> str:
    """Return the version of Triton."""
    return version("triton")
