"""peft: LoHa rounds its scaling alpha / r to torch's default dtype, so in float64 the update is off by up to 6e-8.

With `torch.set_default_dtype(torch.bfloat16)` the update is off by up to 0.4 %, whatever the dtype of the adapter. At
every call, peft makes a tensor from the scaling. Seen in 0.21.2.
"""

import torch
from peft import LoHaConfig, get_peft_model
from torch import nn

config = LoHaConfig(r=3, alpha=40, target_modules=["0"], init_weights=False)
model = get_peft_model(nn.Sequential(nn.Linear(12, 10, dtype=torch.float64)), config)
layer = model.base_model.model[0]
b1, a1, b2, a2 = (
    part["default"].detach() for part in (layer.hada_w1_a, layer.hada_w1_b, layer.hada_w2_a, layer.hada_w2_b)
)
for default in (torch.float64, torch.float32, torch.bfloat16):
    torch.set_default_dtype(default)
    update = layer.get_delta_weight("default").detach()
    ratio = update / ((b1 @ a1) * (b2 @ a2))
    print(f"default {default}: the update in {update.dtype} is the product times {ratio.mean():.9f}, not {40 / 3:.9f}")
