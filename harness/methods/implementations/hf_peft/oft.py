"""peft's OFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported
from harness.methods.implementations.hf_peft.adapted import ADAPTER, PeftAdapted, tuner
from harness.methods.registry import DTYPES, implements

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from reference.oft import Config


@implements("oft", name="hf-peft", dtypes=DTYPES, requires=["peft"])
def oft(model: nn.Module, config: Config, generator: Generator) -> PeftAdapted:
    """Attach peft's OFT to linear layers.

    Raises Unsupported for a quantised base, and if the block size does not divide a layer's input features.
    """
    from peft import OFTConfig
    from torch import nn

    from reference.shared.layers import targets

    found = targets(model, config.targets)
    for path, base in found.items():
        if type(base) is not nn.Linear:
            raise Unsupported(f"{path}: hf-peft offers OFT for dense layers only, and {type(base).__name__} is packed")
        if base.in_features % config.block_size:
            why = f"peft takes the divisor of {base.in_features} that is nearest to {config.block_size}, even a larger one"
            raise Unsupported(f"{path}: {why}")
    peft_config = OFTConfig(
        r=0,
        oft_block_size=config.block_size,
        use_cayley_neumann=config.cayley == "neumann",
        num_cayley_neumann_terms=config.terms,
        target_modules=list(found),
    )
    tuner(model, peft_config, generator)
    return PeftAdapted(model, _packed)


def _packed(layer: Any) -> dict[str, Tensor]:
    return {"Q": layer.oft_R[ADAPTER].weight}
