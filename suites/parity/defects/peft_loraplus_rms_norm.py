"""peft: LoRA+ decays the weights of RMSNorm, but not those of LayerNorm.

It leaves out the classes of transformers' ALL_LAYERNORM_LAYERS, which is torch.nn.LayerNorm alone. transformers' Trainer
also recognises norms by name, and decays none of them. Seen in 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn


class Model(nn.Module):
    """A linear layer and a norm."""

    def __init__(self, norm):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), norm(8)


for norm in (nn.LayerNorm, nn.RMSNorm):
    model = get_peft_model(Model(norm), LoraConfig(target_modules=["linear"]))
    weight = model.base_model.model.norm.weight.requires_grad_(True)
    made = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1)
    group = next(group for group in made.param_groups if any(p is weight for p in group["params"]))
    print(f"{norm.__name__}: its weight has a weight decay of {group['weight_decay']}")
