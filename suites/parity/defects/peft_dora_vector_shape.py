"""peft: DoRA adds a dimension to the output for a single vector: (D,) gives (1, E), where nn.Linear and LoRA give (E,).

It multiplies by m / norm as a matrix of one row. Seen in 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

for use_dora in (False, True):
    config = LoraConfig(r=3, target_modules=["0"], use_dora=use_dora)
    model = get_peft_model(nn.Sequential(nn.Linear(12, 10)), config)
    print(f"use_dora={use_dora}: input (12,), output {tuple(model(torch.randn(12)).shape)}")
