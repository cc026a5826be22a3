"""`axolotl`: the LoRA kernels of Axolotl, as Operations and as the forward passes of peft's LoRA, DoRA and QLoRA layers.

Where Axolotl calls Triton, a GPU is needed, or TRITON_INTERPRET=1 in float32 or float16; Triton's interpreter is
wrong in bfloat16. On a CPU without the interpreter, torch computes the activation between Axolotl's matrix products.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported
from harness.methods.implementations.hf_peft import lora as hf_peft
from harness.methods.implementations.hf_peft import qlora as hf_peft_qlora
from harness.methods.implementations.three_dimensions import in_shape_of, in_three_dimensions
from harness.methods.registry import DTYPES, Implementation, implementations_in, implements

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from harness.methods.implementations.hf_peft.adapted import PeftAdapted
    from reference import dora as reference_dora
    from reference import lora as reference_lora
    from reference import qlora as reference_qlora

_NAME: dict[str, Any] = {"name": "axolotl", "requires": ["axolotl", "peft", "bitsandbytes", "triton"]}
_OPERATION: dict[str, Any] = {**_NAME, "kind": "operation", "dtypes": DTYPES}


def _adapter(W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, m: Tensor | None) -> tuple[Any, ...]:
    """Return Axolotl's arguments for one layer: weight, bias, quant_state, A, B, scale, lora_bias, magnitude."""
    return W, bias, None, A, B, scaling, None, m


def _adapters(
    Ws: list[Tensor], biases: list[Tensor | None] | None, As: list[Tensor], Bs: list[Tensor], scalings: list[float],
    ms: list[Tensor] | None,
) -> list[Any]:  # fmt: skip
    none = [None] * len(Ws)
    layers = zip(Ws, biases or none, As, Bs, scalings, ms or none, strict=True)
    return [argument for layer in layers for argument in _adapter(*layer)]


@implements("dora_linear", **_OPERATION)
def dora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, m: Tensor | None, scaling: float,
    mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return the output of a DoRA layer, computed by Axolotl's LoRA_O, the kernel for an attention block's output layer.

    m: magnitudes, or None for LoRA. mask: dropout mask by which x is multiplied, or None.
    """
    from axolotl.kernels.lora import LoRA_O

    X = in_three_dimensions(x)
    dropped = None if mask is None else X * in_three_dimensions(mask)
    y = LoRA_O.apply(X, dropped, *_adapter(W, bias, A, B, scaling, m))
    return in_shape_of(x, y)


@implements("lora_linear", **_OPERATION)
def lora_linear(**given: Any) -> Any:
    """Return the output of a LoRA layer, computed by Axolotl's LoRA_O. given: the arguments of `dora_linear` except m."""
    return dora_linear(m=None, **given)


@implements("lora_qkv", **_OPERATION)
def lora_qkv(x: Tensor, **layers: Any) -> tuple[Tensor, ...]:
    """Return q, k and v of an attention block, computed by Axolotl's LoRA_QKV. layers: the arguments of `_adapters`."""
    from axolotl.kernels.lora import LoRA_QKV

    outputs = LoRA_QKV.apply(in_three_dimensions(x), None, *_adapters(**layers), True)
    return tuple(in_shape_of(x, y) for y in outputs)


@implements("lora_mlp", **_OPERATION)
def lora_mlp(x: Tensor, activation: str, **layers: Any) -> Tensor:
    """Return the output of a feed-forward block, computed by Axolotl's LoRA_MLP. layers: the arguments of `_adapters`.

    If the name `activation` contains `gelu`, GEGLU is used, otherwise SwiGLU. Axolotl's patch of models does the same.
    """
    from axolotl.kernels.lora import LoRA_MLP

    from harness.methods.implementations.gated_activations import activation_functions

    name = "geglu" if "gelu" in activation else "swiglu"
    forward, backward = activation_functions(f"axolotl.kernels.{name}", f"{name}_forward", f"{name}_backward", x)
    y = LoRA_MLP.apply(in_three_dimensions(x), None, *_adapters(**layers), forward, backward, True)
    return in_shape_of(x, y)


@implements("lora", dtypes=DTYPES, **_NAME)
def lora(model: nn.Module, config: reference_lora.Config, generator: Generator) -> PeftAdapted:
    """Attach peft's LoRA, and compute its linear layers by LoRA_O and its embeddings by LoRA_Embedding."""
    return _with_kernels(hf_peft.lora(model, config, generator))


@implements("dora", dtypes=DTYPES, **_NAME)
def dora(model: nn.Module, config: reference_dora.Config, generator: Generator) -> PeftAdapted:
    """Attach peft's DoRA, and compute its linear layers by LoRA_O and its embeddings by LoRA_Embedding."""
    return _with_kernels(hf_peft.dora(model, config, generator))


@implements("qlora", devices=["cuda"], **_NAME)
def qlora(model: nn.Module, config: reference_qlora.Config, generator: Generator) -> PeftAdapted:
    """Attach peft's LoRA over 4-bit weights, and compute its layers by LoRA_O, which decodes the weights by CUDA calls."""
    return _with_kernels(hf_peft_qlora.qlora(model, config, generator))


def _with_kernels(adapted: PeftAdapted) -> PeftAdapted:
    """Replace the forward passes of peft's layers by Axolotl's kernels, and return `adapted`.

    Raises Unsupported for a layer without a kernel.
    """
    for path, layer in adapted.layers.items():
        kind = type(layer).__name__
        if kind not in ("Linear", "Linear4bit", "Embedding") or getattr(layer, "fan_in_fan_out", False):
            adapted.detach()
            raise Unsupported(f"{path}: Axolotl has no LoRA kernel for {type(layer.get_base_layer()).__name__}")
        layer.forward = partial(_embedding if kind == "Embedding" else _linear, layer)
    return adapted


def _linear(layer: Any, x: Tensor) -> Tensor:
    from axolotl.kernels.lora import apply_lora_linear

    return in_shape_of(x, apply_lora_linear(layer, in_three_dimensions(x)))


def _embedding(layer: Any, x: Tensor) -> Any:
    from axolotl.kernels.lora import apply_lora_embedding

    return apply_lora_embedding(layer, x)


def implementations() -> list[Implementation]:
    """Return the Implementations of this file."""
    return implementations_in(__name__)
