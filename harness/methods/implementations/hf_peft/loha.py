"""peft's LoHa."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.methods.implementations.hf_peft.adapted import ADAPTER, PeftAdapted, dense_targets, tuner
from harness.methods.registry import DTYPES, implements

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from reference.loha import Config


@implements("loha", name="hf-peft", dtypes=DTYPES, requires=["peft"])
def loha(model: nn.Module, config: Config, generator: Generator) -> PeftAdapted:
    """Attach peft's LoHa to linear layers. Raises Unsupported for a quantised base."""
    from peft import LoHaConfig

    names = list(dense_targets(model, config.targets, "LoHa"))
    peft_config = LoHaConfig(r=config.rank, alpha=config.alpha, rank_dropout=config.rank_dropout, target_modules=names)
    tuner(model, peft_config, generator)
    return PeftAdapted(model, _factors)


def _factors(layer: Any) -> dict[str, Tensor]:
    """Map the paper's letters to the parameters of peft's layer. peft's w1_a and w2_a are the paper's B1 and B2."""
    return {
        "A1": layer.hada_w1_b[ADAPTER], "B1": layer.hada_w1_a[ADAPTER],
        "A2": layer.hada_w2_b[ADAPTER], "B2": layer.hada_w2_a[ADAPTER],
    }  # fmt: skip
