"""peft: VeRA draws A and B in torch's default dtype, so one key gives other projections under another default.

A file that holds only b and d (`save_projection=False`) then gives other outputs. Seen in 0.21.2.
"""

import torch
from peft import VeraConfig, get_peft_model
from torch import nn

for default in (torch.float32, torch.float64, torch.bfloat16):
    base = nn.Sequential(nn.Linear(12, 10))
    torch.set_default_dtype(default)  # e.g. by a program that builds its model in bfloat16
    model = get_peft_model(base, VeraConfig(r=3, target_modules=["0"], projection_prng_key=7))
    torch.set_default_dtype(torch.float32)
    A = model.base_model.model[0].vera_A["default"]
    print(f"default {default}: A begins with {A.flatten()[:3].tolist()}")
