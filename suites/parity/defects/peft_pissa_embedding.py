"""peft: init_lora_weights="pissa" on an nn.Embedding starts as plain LoRA, without a warning.

A is zero, B is random, and the table is unchanged, so the principal part does not train. On a Conv2d the same setting
raises. Seen in 0.21.2.
"""

import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

warnings.simplefilter("error")  # there is no warning
for name, layer in (("nn.Linear", nn.Linear(32, 16)), ("nn.Embedding", nn.Embedding(32, 16))):
    torch.manual_seed(0)
    W = layer.weight.detach().clone()
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights="pissa", target_modules=["0"])
    adapted = get_peft_model(nn.Sequential(layer), config).base_model.model[0]
    moved = float((adapted.base_layer.weight.detach() - W).norm() / W.norm())
    update = float(adapted.get_delta_weight("default").detach().norm() / W.norm())
    print(f"{name}: of the weight {update:.3g} trains and {moved:.3g} was taken out of it (norms)")
