"""peft: AdaLoRA accepts target_r >= init_r, but its first pruning raises: it asks torch.kthvalue for the 0th value.

The authors' code does the same. Seen in 0.21.2.
"""

import torch
from peft import AdaLoraConfig, get_peft_model
from torch import nn

for init, target in ((4, 2), (4, 4), (2, 4)):
    config = AdaLoraConfig(init_r=init, target_r=target, target_modules=["0"], total_step=10)
    model = get_peft_model(nn.Sequential(nn.Linear(12, 10)), config)
    model(torch.randn(4, 12)).square().mean().backward()
    try:
        model.base_model.update_and_allocate(1)
    except RuntimeError as error:
        print(f"init_r={init} target_r={target}: {error}")
    else:
        print(f"init_r={init} target_r={target}: ok")
