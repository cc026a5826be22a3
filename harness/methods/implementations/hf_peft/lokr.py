"""peft's LoKr."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported
from harness.methods.implementations.hf_peft.adapted import ADAPTER, PeftAdapted, dense_targets, tuner
from harness.methods.registry import DTYPES, implements

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from reference.lokr import Config


@implements("lokr", name="hf-peft", dtypes=DTYPES, requires=["peft"])
def lokr(model: nn.Module, config: Config, generator: Generator) -> PeftAdapted:
    """Attach peft's LoKr to linear layers.

    Raises Unsupported for a quantised base, and for a factor that divides a layer's size and exceeds the size's square
    root.
    """
    from peft import LoKrConfig

    found = dense_targets(model, config.targets, "LoKr")
    for path, base in found.items():
        for size in (base.in_features, base.out_features):
            if config.factor > 0 and size % config.factor == 0 and config.factor**2 > size:
                why = f"peft takes the factor {config.factor} of {size} though it is above the square root"
                raise Unsupported(f"{path}: {why}")
    peft_config = LoKrConfig(
        r=config.rank,
        alpha=config.alpha,
        decompose_factor=config.factor or -1,
        rank_dropout=config.rank_dropout,
        rank_dropout_scale=True,
        init_weights=True if config.init == "peft" else config.init,
        target_modules=list(found),
    )
    tuner(model, peft_config, generator)
    return PeftAdapted(model, _blocks)


def _blocks(layer: Any) -> dict[str, Tensor]:
    """Map letters of the paper to the parameters of peft's layer: w1 is C, and w2 is W2 or has the factors B and A."""
    named = {"C": layer.lokr_w1, "B": layer.lokr_w2_a, "A": layer.lokr_w2_b, "W2": layer.lokr_w2}
    return {name: parts[ADAPTER] for name, parts in named.items() if ADAPTER in parts}
