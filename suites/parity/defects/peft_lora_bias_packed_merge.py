"""peft: merging `lora_bias` into a layer of bitsandbytes in 4 or 8 bits adds the bias of B without the scaling.

The forward pass and the merge into a plain layer add scaling times the bias. With `safe_merge=True` the merge raises,
as it asks whether a tensor with several elements is true. A merge into a packed layer without a bias raises
AttributeError after the weight was changed; a plain layer raises RuntimeError with the reason. Seen in 0.21.2.
"""

import warnings

import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

warnings.simplefilter("ignore")


def packed(bits: int, bias: bool) -> nn.Module:
    """Return a layer in 4 or 8 bits on the CPU, or a plain layer for 32 bits."""
    torch.manual_seed(0)
    dense = nn.Linear(64, 32, bias=bias)
    if bits == 32:
        return dense
    if bits == 8:
        layer = bitsandbytes.nn.Linear8bitLt(64, 32, bias=bias, has_fp16_weights=False)
        layer.load_state_dict(dense.state_dict())
        return layer.to("cpu")
    layer = bitsandbytes.nn.Linear4bit(64, 32, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(dense.state_dict())
    layer.weight = bitsandbytes.nn.Params4bit(dense.weight.detach(), quant_type="nf4", module=layer).to("cpu")
    return layer


def adapted(bits: int, bias: bool = True) -> nn.Module:
    """Return a model of one layer with peft's LoRA: scaling 4, initial A and B, and a bias of B that is 1."""
    model = nn.Sequential(packed(bits, bias))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == 4, bits == 8
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=8, target_modules=["0"], lora_bias=True))
    model.base_model.model[0].lora_B["default"].bias.data.fill_(1.0)
    return model


for bits in (32, 4, 8):
    try:
        model = adapted(bits)
        layer = model.base_model.model[0].get_base_layer()
        before = layer.bias.detach().clone()
        model.merge_adapter()
        print(f"{bits} bits: merging adds {float((layer.bias - before).mean()):.4g} to the bias (should be 4)")
    except (RuntimeError, AttributeError) as error:
        print(f"{bits} bits: raised {type(error).__name__}: {error}")
    for what, bias, safe in (("safe_merge", True, True), ("no bias in the base", False, False)):
        try:
            adapted(bits, bias).merge_adapter(safe_merge=safe)
            print(f"{bits} bits, {what}: merged")
        except (RuntimeError, AttributeError) as error:
            print(f"{bits} bits, {what}: raised {type(error).__name__}: {error}")
