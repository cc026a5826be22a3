"""peft: DoRA on a bfloat16 or float16 model is not the base model at its start.

The magnitude is taken in the weight's dtype, rounded, and then cast to float32 with the rest of the adapter; forward takes
the norm in float32. So m / norm is not 1. LoRA's start is exact. Here on 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for use_dora in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 512, dtype=dtype))
        x = torch.randn(64, 256, dtype=dtype)
        y = model(x).detach()
        model = get_peft_model(model, LoraConfig(r=3, target_modules=["0"], use_dora=use_dora))
        share = float((model(x) != y).float().mean())
        print(f"{dtype} use_dora={use_dora}: {share:.1%} of the outputs differ from the base model's")
