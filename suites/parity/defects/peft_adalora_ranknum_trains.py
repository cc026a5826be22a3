"""peft: AdaLoRA divides its update by the parameter `ranknum`, which trains unless the model is in float32.

`ranknum` is made with requires_grad=False, but moving it to another dtype makes a new parameter, which trains. An optimizer
over all parameters that require a gradient then changes the scaling alpha / ranknum, which is not saved with the adapter.
Present since 0.21.0.
"""

import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn

for dtype in (torch.float32, torch.float64, torch.bfloat16):
    torch.manual_seed(0)
    config = AdaLoraConfig(init_r=4, target_r=2, target_modules=["0"], total_step=100)
    model = get_peft_model(nn.Sequential(nn.Linear(12, 10, dtype=dtype)), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x = torch.randn(8, 12, dtype=dtype)
    for _ in range(50):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    ranknum = model.base_model.model[0].ranknum["default"]
    print(f"{dtype}: ranknum trains: {ranknum.requires_grad}; after 50 steps it is {ranknum.item():.4g}, should be 4")
