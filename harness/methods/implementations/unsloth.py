"""`unsloth`: the LoRA kernels of Unsloth as Operations.

On a CPU, `import unsloth` falls back to the layers of transformers and peft, and it patches torch, transformers and peft
for the whole process. So this module imports the kernels without the package around them. On a CPU,
`gated_activations` chooses between Unsloth's Triton code and torch. NF4 needs a GPU.
"""

from __future__ import annotations

import os
import sys
import tempfile
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported
from harness.methods.implementations.three_dimensions import in_shape_of, in_three_dimensions
from harness.methods.registry import DTYPES, Implementation, implements

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_NAME: dict[str, Any] = {
    "name": "unsloth", "kind": "operation", "dtypes": DTYPES,
    # This package of unsloth_zoo patches nothing. Importing unsloth itself would patch torch.
    "requires": ["unsloth_zoo_downloads", "bitsandbytes", "triton"],
}  # fmt: skip


@cache
def _kernels() -> Any:
    """Import and return unsloth.kernels.fast_lora, without running the `__init__` of `unsloth` and `unsloth.kernels`."""
    import torch

    folder = Path(str(find_spec("unsloth").origin)).parent  # type: ignore[union-attr]
    for name, path in (("unsloth", folder), ("unsloth.kernels", folder / "kernels")):
        package = ModuleType(name)
        package.__path__ = [str(path)]
        package.__spec__ = ModuleSpec(name, None, is_package=True)
        package.__dict__["__version__"] = version("unsloth")
        sys.modules[name] = package
    os.environ["UNSLOTH_IS_PRESENT"] = "1"
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp())  # else it writes into the current folder
    if not torch.cuda.is_available():
        os.environ["UNSLOTH_ALLOW_CPU"] = "1"
    from unsloth.kernels import fast_lora

    return fast_lora


def _adapters(
    Ws: list[Tensor], biases: list[Tensor] | None, As: list[Tensor], Bs: list[Tensor], scalings: list[float],
    ms: list[Tensor] | None,
) -> list[Any]:  # fmt: skip
    """Return weight, quant_state, A, B and scale of each layer. Raises Unsupported for biases and magnitudes."""
    if biases is not None or ms is not None:
        raise Unsupported(
            "Unsloth's kernels support neither a bias of the base nor DoRA; Unsloth then calls peft's layers"
        )
    return [one for W, A, B, s in zip(Ws, As, Bs, scalings, strict=True) for one in (W, None, A, B, s)]


@implements("lora_linear", **_NAME)
def lora_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, mask: Tensor | None
) -> Tensor:
    """Return the output of a LoRA layer, computed by Unsloth's LoRA_W.

    Raises Unsupported for a given dropout mask, since LoRA_W draws a mask itself.
    """
    if mask is not None:
        raise Unsupported("LoRA_W draws its own dropout mask and takes no other")
    layer = _adapters([W], None if bias is None else [bias], [A], [B], [scaling], None)
    return in_shape_of(x, _kernels().LoRA_W.apply(in_three_dimensions(x), *layer))


@implements("lora_qkv", **_NAME)
def lora_qkv(x: Tensor, **layers: Any) -> tuple[Tensor, ...]:
    """Return q, k and v of an attention block, computed by Unsloth's LoRA_QKV with its default inplace=True.

    layers: the arguments of `_adapters`.
    """
    outputs = _kernels().LoRA_QKV.apply(in_three_dimensions(x), *_adapters(**layers), True)
    return tuple(in_shape_of(x, y) for y in outputs)


@implements("lora_mlp", **_NAME)
def lora_mlp(x: Tensor, activation: str, **layers: Any) -> Tensor:
    """Return the output of a feed-forward block, computed by Unsloth's LoRA_MLP with its default inplace=True.

    layers: the arguments of `_adapters`.
    """
    from harness.methods.implementations.gated_activations import activation_functions

    functions = _kernels()
    if activation == "silu":
        module, forward, backward = "swiglu", "swiglu_fg_kernel", "swiglu_DWf_DW_dfg_kernel"
    else:
        kind = "exact" if activation == "gelu" else "approx"
        module, forward, backward = "geglu", f"geglu_{kind}_forward_kernel", f"geglu_{kind}_backward_kernel"
    pair = activation_functions(f"unsloth.kernels.{module}", forward, backward, x, up_first=True)
    y = functions.LoRA_MLP.apply(in_three_dimensions(x), *_adapters(**layers), *pair, True)
    return in_shape_of(x, y)


@implements("nf4_dequantize", **_NAME | {"devices": ["cuda"], "dtypes": ["float32", "bfloat16", "float16"]})
def nf4_dequantize(packed: Tensor, absmax: Tensor, block: int, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """Decode an NF4 weight by Unsloth's fast_dequantize, which calls CUDA itself and takes bitsandbytes' QuantState."""
    from bitsandbytes.functional import QuantState, get_4bit_type

    code = get_4bit_type("nf4", device=packed.device)
    state = QuantState(absmax, shape, code, block, "nf4", dtype)
    return _kernels().fast_dequantize(packed[:, None], state)


def implementations() -> list[Implementation]:
    """Return the Implementations of this file."""
    return [lora_linear, lora_qkv, lora_mlp, nf4_dequantize]
