"""DoRA as one product with the low-rank term, and a gain per output."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.errors import Unsupported
from harness.methods.registry import implements
from reference.spec import Deviation

if TYPE_CHECKING:
    from torch import Generator, nn

    from harness.methods.spec import Adapted
    from reference.dora import Config
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
def dora(model: nn.Module, config: Config, generator: Generator) -> Adapted:
    """Attach layers that compute by `dora_linear` to `config.targets`.

    Raises Unsupported for per=input and for a norm with a gradient. A layer over another quantised base computes as the
    reference does, with the base's own product instead of one with its decoded weight.
    """
    from harness.kernels.torch.support.shared_input import link
    from harness.methods.implementations.fused.layers.dora import FusedDoraLinear
    from reference.dora import attach

    if config.per != "output" or not config.detach_norm:
        raise Unsupported("the fused DoRA supports per=output with detach_norm=true only")
    adapted = attach(model, config, generator)
    for layer in adapted.layers.values():
        layer.__class__ = FusedDoraLinear
    link(adapted.layers)
    return adapted
