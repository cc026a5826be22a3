"""DoRA: one product with the low-rank term in it, and a gain for each output."""

from __future__ import annotations

from typing import Any

from harness.errors import Unsupported
from harness.methods.registry import implements
from reference.spec import Deviation

DEVIATIONS = (
    Deviation(
        topic="dropout",
        paper="W0 x + b + (g - 1) W0 d + g s B A d, with d what dropout leaves of x",
        here="W0 (x - d) + b + g (W0 d + s B A d)",
        why="where W0 and s B A nearly cancel, they do so in the accumulator of one product. While g is 1 and B is 0 "
        "the output is the base's within rounding, not to the last bit; near a dropout of 1, which makes d large, "
        "that costs digits",
    ),
)
DTYPES = ("float64", "float32", "bfloat16", "float16")


@implements("dora", name="fused", dtypes=DTYPES)
def dora(model: Any, config: Any, generator: Any) -> Any:
    """Attach layers that compute by `dora_linear` to what `config.targets` names; config as `reference.dora.Config`.

    Raises Unsupported for a magnitude per input and for a norm with a gradient. A layer over another quantised base computes
    as the reference does, with the base's own product in the place of one with its decoded weight.
    """
    from harness.kernels.torch.support.shared_input import link
    from harness.methods.implementations.fused.layers.dora import FusedDoraLinear
    from reference.dora import attach

    if config.per != "output" or not config.detach_norm:
        raise Unsupported("the fused DoRA has a magnitude per output, and takes the norm for a constant")
    adapted = attach(model, config, generator)
    for layer in adapted.layers.values():
        layer.__class__ = FusedDoraLinear
    link(adapted.layers)
    return adapted
