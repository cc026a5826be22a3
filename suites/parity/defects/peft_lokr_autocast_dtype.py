"""peft: under autocast, a linear layer with LoKr returns the dtype of its input, not autocast's as the base layer does.

So layers of one model have two dtypes, and an operation that autocast does not know may refuse them. Seen in 0.21.2.
"""

import torch
from peft import LoKrConfig, LoraConfig, get_peft_model
from torch import nn

for config in (None, LoraConfig(target_modules=["0"]), LoKrConfig(target_modules=["0"])):
    model = nn.Sequential(nn.Linear(8, 8))
    model = model if config is None else get_peft_model(model, config)
    with torch.autocast("cpu", torch.bfloat16):
        print(f"{'base' if config is None else type(config).__name__}: {model(torch.randn(2, 8)).dtype}")
