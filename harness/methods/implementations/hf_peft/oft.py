"""peft's OFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported
from harness.methods.implementations.hf_peft.adapted import ADAPTER, PeftAdapted, dense_targets, tuner
from harness.methods.registry import DTYPES, implements

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from reference.oft import Config


@implements("oft", name="hf-peft", dtypes=DTYPES, requires=["peft"])
def oft(model: nn.Module, config: Config, generator: Generator) -> PeftAdapted:
    """Attach peft's OFT to linear layers.

    Raises Unsupported for a quantised base, and if peft divides a layer's input features into other blocks than the
    reference: peft takes the divisor that is nearest to the block size, even a larger one.
    """
    from peft import OFTConfig
    from peft.tuners.oft.layer import OFTLayer

    from reference.oft import blocks

    found = dense_targets(model, config.targets, "OFT")
    for path, size in blocks(found, config.block_size).items():
        D = found[path].in_features
        nearest = OFTLayer.adjust_oft_parameters(None, D, config.block_size)
        if nearest != size:
            why = f"peft divides {D} input features into blocks of {nearest}, and the reference into blocks of {size}"
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
