"""PiSSA of rank 7 on a weight of 5 rows has factors of rank 5, and the scaling alpha / 7. peft 0.21.2.

A matrix of 5 rows has 5 singular values. peft cuts the SVD off at 7 of them, so it gets 5. It says nothing, and keeps r = 7
in the config and in the scaling.
"""

import torch
from peft import LoraConfig, get_peft_model

model = torch.nn.Sequential(torch.nn.Linear(8, 5, bias=False))
config = LoraConfig(r=7, lora_alpha=7, target_modules=["0"], init_lora_weights="pissa")
layer = get_peft_model(model, config).base_model.model[0]
print("shape of A:", tuple(layer.lora_A["default"].weight.shape), "of B:", tuple(layer.lora_B["default"].weight.shape))
print("r:", layer.r["default"], "scaling:", layer.scaling["default"])
print("trainable:", sum(p.numel() for p in layer.parameters() if p.requires_grad), "of the 7 x (8 + 5) =", 7 * (8 + 5))
