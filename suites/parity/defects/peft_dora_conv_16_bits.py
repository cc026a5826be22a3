"""peft: DoRA with dropout on a Conv2d in 16 bits raises in training.

peft keeps A and B in float32 and converts the input to float32. With dropout it convolves this input again with the base's
weight, which has 16 bits. Without dropout it uses the base's output instead. Seen in 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

for dropout in (0.0, 0.25):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"], use_dora=True, lora_dropout=dropout)
    model = get_peft_model(nn.Sequential(nn.Conv2d(4, 8, 3)).bfloat16(), config).train()
    try:
        print(f"dropout {dropout}: {model(torch.randn(1, 4, 9, 9, dtype=torch.bfloat16)).dtype}")
    except RuntimeError as error:
        print(f"dropout {dropout}: {error}")
