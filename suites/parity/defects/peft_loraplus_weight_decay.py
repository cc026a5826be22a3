"""peft: LoRA+ ignores the keyword `weight_decay`, although it passes unknown keywords on to the optimizer.

Every group gets a weight decay of its own, which is that of the undocumented keyword `loraplus_weight_decay`, or 0. So
nothing decays, and nothing warns. Seen in 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
for keyword in ("weight_decay", "loraplus_weight_decay"):
    made = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, **{keyword: 0.1})
    decays = [group["weight_decay"] for group in made.param_groups if group["params"]]
    print(f"{keyword}=0.1: the groups of A and B have weight decays of {decays}")
