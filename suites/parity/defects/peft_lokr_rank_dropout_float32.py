"""peft: LoKr divides the mask of rank dropout by its mean in float32, so in float64 the update is off by up to 6e-8.

The mask is made by `.float()`. The mask of LoHa has the dtype of the update. Seen in 0.21.2.
"""

import torch
from peft import LoKrConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
config = LoKrConfig(r=3, alpha=3, target_modules=["0"], rank_dropout=0.5, rank_dropout_scale=True, init_weights=False)
layer = get_peft_model(nn.Sequential(nn.Linear(12, 35, dtype=torch.float64)), config).base_model.model[0]
plain = layer.get_delta_weight("default").detach()
dropped = layer.get_delta_weight("default", apply_rank_dropout=True).detach()
factors = (dropped / plain).mean(dim=1)
left = int((factors > 0).sum())
print(f"{left} of 35 rows are left; they are multiplied by {factors.max():.12f}, should be {35 / left:.12f}")
