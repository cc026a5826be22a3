"""peft: PiSSA computes the residual before A and B are rounded to the 16 bits of the base weight.

The residual therefore lacks the rounding errors of A and B, and W_res + (alpha / r) B A is further from W than half a
unit in the last place of W_res. Rounding A and B first, as here by hand, avoids this at no cost. Seen in 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
base = nn.Sequential(nn.Linear(128, 96, dtype=torch.bfloat16))
W = base[0].weight.detach().double().clone()
config = LoraConfig(r=16, lora_alpha=16, init_lora_weights="pissa", target_modules=["0"])
layer = get_peft_model(base, config).base_model.model[0]
A, B = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
print(f"A is {A.dtype}; all of its values have 16 bits: {bool((A.bfloat16() == A).all())}")
residual, product = layer.base_layer.weight.detach(), B.double() @ A.double()
rounded = (W - product).to(residual.dtype)
print(f"wrongly rounded elements of the residual: {float((residual != rounded).float().mean()):.0%}")
for name, rest in (("peft", residual), ("factors rounded first", rounded)):
    print(f"{name}: relative error of W_res + B A is {float((rest.double() + product - W).norm() / W.norm()):.2e}")
