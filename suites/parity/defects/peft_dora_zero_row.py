"""peft: DoRA divides m by the norm of each row, so a row of zeros in the base weight gives NaN (0 / 0).

arXiv:2402.09353, eq. 5, does not define such a row. The defect is as old as DoRA in peft (0.9). Seen in 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(12, 10))
model[0].weight.data[4] = 0
x = torch.randn(2, 12)
print("base   ", model(x)[:, 4].tolist())
model = get_peft_model(model, LoraConfig(r=3, target_modules=["0"], use_dora=True))
print("adapted", model(x)[:, 4].tolist(), "(B is zero: should be the base's)")
model(x).sum().backward()
print("NaN in the gradient of A:", bool(model.base_model.model[0].lora_A["default"].weight.grad.isnan().any()))
