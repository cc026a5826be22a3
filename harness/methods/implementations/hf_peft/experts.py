"""peft's LoRA on the stacked experts of a Mixtral block, selected by `target_parameters`, as an Operation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.errors import Unsupported
from harness.methods.implementations.hf_peft.adapted import wrappers
from harness.methods.registry import DTYPES, implements

if TYPE_CHECKING:
    from torch import Tensor


@implements("lora_experts", name="hf-peft", kind="operation", dtypes=DTYPES, requires=["peft"])
def lora_experts(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, gate_up_A: Tensor, gate_up_B: Tensor,
    down_A: Tensor, down_B: Tensor, scaling: float, transposed: bool,
) -> Any:  # fmt: skip
    """Run transformers' experts of Mixtral with peft's wrappers around both parameters, and return the output.

    Adapters in 16 bits are cast to float32, as peft casts them on loading. Raises Unsupported for numbers of experts that
    are not int64: transformers counts the tokens of each expert by `one_hot`.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    if chosen.dtype != torch.int64:
        raise Unsupported(f"transformers' experts take numbers in int64, not in {chosen.dtype}")
    names = ("gate_up_proj", "down_proj")
    model = nn.Sequential(_experts(gate_up, down, transposed))
    rank = len(gate_up_A) // len(gate_up)
    config = LoraConfig(
        r=rank, lora_alpha=scaling * rank, target_modules=[], target_parameters=[f"0.{name}" for name in names]
    )
    get_peft_model(model, config)
    layer: Any = model[0]
    inside, outside = wrappers(layer)
    paths = {one.parameter_name: path for path, one in (("base_layer.", inside), ("", outside))}
    tensors = {}
    for name, A, B in zip(names, (gate_up_A, down_A), (gate_up_B, down_B), strict=True):
        for letter, tensor in (("A", A), ("B", B)):
            wide = torch.promote_types(tensor.dtype, torch.float32)
            tensors[f"{paths[name]}lora_{letter}.default.weight"] = tensor.to(wide)
    # The tensors themselves, so that gradients reach them.
    return torch.func.functional_call(layer, tensors, (x, chosen, weights))


def _experts(gate_up: Tensor, down: Tensor, transposed: bool) -> Any:
    """Return Mixtral's module of experts with these frozen weights. transposed: True for weights (K, inputs, outputs)."""
    import torch
    from torch import nn
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    K, D, H = len(gate_up), *(down.shape[1:] if not transposed else down.shape[:0:-1])
    config = MixtralConfig(hidden_size=D, intermediate_size=H, num_local_experts=K)
    # Only the grouped product reads `is_transposed`, and torch has none in float64.
    config._experts_implementation = "batched_mm" if transposed else "eager"
    with torch.device("meta"):
        experts = MixtralExperts(config)
    experts.is_transposed = transposed
    experts.gate_up_proj, experts.down_proj = (nn.Parameter(t, requires_grad=False) for t in (gate_up, down))
    return experts
