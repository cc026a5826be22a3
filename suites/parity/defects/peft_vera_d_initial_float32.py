"""peft: VeRA's d starts as d_initial rounded to float32, even in a float64 model: an error of 1.5e-8.

peft fills d in torch's default dtype, and casts it afterwards. Seen in 0.21.2.
"""

import torch
from peft import VeraConfig, get_peft_model
from torch import nn

model = get_peft_model(nn.Sequential(nn.Linear(12, 10, dtype=torch.float64)), VeraConfig(r=3, target_modules=["0"]))
d = model.base_model.model[0].vera_lambda_d["default"]
print(f"{d.dtype}: d starts at {d[0].item()!r}, d_initial is 0.1")
