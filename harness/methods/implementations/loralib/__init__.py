"""`loralib`: LoRA by its authors' package. Its layers replace the model's layers and share their weight tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.methods.registry import DTYPES, Implementation, implements

if TYPE_CHECKING:
    from torch import Generator, nn

    from harness.methods.spec import Adapted
    from reference.lora import Config


@implements("lora", name="loralib", dtypes=DTYPES, requires=["loralib"])
def lora(model: nn.Module, config: Config, generator: Generator) -> Adapted:
    """Replace the targets by loralib's Linear, Embedding or Conv2d.

    A Conv1D becomes a Linear with fan_in_fan_out. loralib draws from torch's global generator, which is seeded here.
    Raises Unsupported for rslora, packed weights, and subclasses with another forward pass; for a convolution with
    conv=peft, dropout or a kernel that is not square; and for another init than kaiming, unless the layer is linear or
    a Conv1D.
    """
    from harness.methods.implementations.loralib.layers import attach

    return attach(model, config, generator)


@implements("lora", name="loralib-merging", dtypes=["float32"], requires=["loralib"])
def merging(model: nn.Module, config: Config, generator: Generator) -> Adapted:
    """Attach LoRA as `lora` does, but with loralib's default merge_weights=True: `eval()` merges, `train()` unmerges."""
    from harness.methods.implementations.loralib.layers import attach

    adapted = attach(model, config, generator)
    layers: dict[str, Any] = adapted.layers
    for layer in layers.values():
        layer.merge_weights = True
        layer.train(layer.training)
    return adapted


def implementations() -> list[Implementation]:
    """Return the Implementations of this file."""
    return [lora, merging]
