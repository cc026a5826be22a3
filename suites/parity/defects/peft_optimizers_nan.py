"""peft: a step of LoRA-FA or of Riemannian LoRA raises if A or B has a NaN, where other optimizers go on with NaN.

Both compute the pseudo-inverse of an r x r matrix, which torch refuses if an entry is not finite. The error names
torch.linalg.svd and no tensor. Seen in 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_riemannian_optimizer
from torch import nn

for name in ("LoRA-FA", "Riemannian LoRA", "AdamW"):
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
    optimizer = {
        "LoRA-FA": lambda m: create_lorafa_optimizer(m, r=2, lora_alpha=8, lr=1e-3),
        "Riemannian LoRA": lambda m: create_riemannian_optimizer(m, torch.optim.AdamW, lr=1e-3),
        "AdamW": lambda m: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad]),
    }[name](model)
    model(torch.ones(1, 8)).sum().backward()
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data[0, 0] = torch.nan
    try:
        optimizer.step()
        print(f"{name}: no exception")
    except torch.linalg.LinAlgError as error:
        print(f"{name}: LinAlgError: {error}")
