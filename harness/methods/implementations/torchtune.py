"""`torchtune`: LoRALinear and DoRALinear with torchtune's merge, over dense weights and over torchao's NF4.

torchtune is no longer developed.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported
from harness.methods.implementations import torchao
from harness.methods.registry import DTYPES, Implementation, implementations_in, implements

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor, nn

    from harness.methods.spec import Adapted
    from reference import dora as reference_dora
    from reference import lora as reference_lora

_NAME: dict[str, Any] = {"name": "torchtune", "requires": ["torchtune", "torchao"]}


@implements("lora", dtypes=DTYPES, **_NAME)
def lora(model: nn.Module, config: reference_lora.Config, generator: Generator) -> Adapted:
    """Replace linear layers by LoRALinear. Raises Unsupported for rslora, and for targets that are not linear.

    torchtune draws from torch's global generator, which is seeded here.
    """
    if config.rslora:
        raise Unsupported("torchtune has no rslora: its scaling is alpha / r")
    from torchtune.modules.peft import LoRALinear

    return _attach(model, config, generator, LoRALinear, config.init)


@implements("dora", dtypes=DTYPES, **_NAME)
def dora(model: nn.Module, config: reference_dora.Config, generator: Generator) -> Adapted:
    """Replace linear layers by DoRALinear, with the initial magnitudes of torchtune's recipes.

    Raises Unsupported for per=input, for detach_norm=false, and for targets that are not linear.
    """
    if config.per != "output" or not config.detach_norm:
        raise Unsupported("torchtune has one magnitude per output, and its norm is a constant")
    from torchtune.modules.peft import DoRALinear

    return _attach(model, config, generator, DoRALinear, "kaiming")


def _attach(model: nn.Module, config: Any, generator: Generator, kind: type[Any], init: str) -> Adapted:
    import torch

    from harness.methods.implementations.torchtune_layers import TorchtuneLayers, adapted_layer
    from reference.shared.layers import KINDS, kind_of, replace, targets
    from reference.shared.lora_start import write_initial_factors

    bases = targets(model, config.targets, KINDS)
    for path, base in bases.items():
        if kind_of(base) != "linear" or not (type(base) is torch.nn.Linear or hasattr(base, "packed")):
            raise Unsupported(f"{path}: torchtune has no layer that computes as {type(base).__name__} does")
    with torch.random.fork_rng():
        torch.manual_seed(generator.initial_seed())
        layers = {path: adapted_layer(kind, base, config) for path, base in bases.items()}
    model.requires_grad_(False)
    for path, layer in layers.items():
        if init != "kaiming":  # kaiming is torchtune's own start; it has no other
            write_initial_factors(init, layer.lora_a.weight, layer.lora_b.weight, generator)
        replace(model, path, layer)
    return TorchtuneLayers(model, bases, layers, config)


@implements("nf4-dq", kind="base", **_NAME)
def nf4_dq(model: nn.Module, paths: list[str], dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor, int, bool]]:
    """Replace linear layers as `torchao.nf4_dq` does, and return what `torchao.nf4_dq` returns.

    The layers multiply as FrozenNF4Linear does, which is the base layer of torchtune's QLoRA.
    """
    from torchtune.modules.low_precision import FrozenNF4Linear

    def forward(self: Any, x: Tensor) -> Any:
        return FrozenNF4Linear.forward(SimpleNamespace(weight=self.packed[0], bias=self.bias), x)

    forms: dict[str, tuple[Tensor, Tensor, int, bool]] = torchao.nf4_dq(model, paths, dtype)
    for path in paths:
        layer: Any = model.get_submodule(path)
        layer.__class__ = type("FrozenNF4Linear", (type(layer),), {"forward": forward})
    return forms


def implementations() -> list[Implementation]:
    """Return the Implementations of this file."""
    return [one for one in implementations_in(__name__) if one.name == "torchtune"]
