"""peft: PiSSA gives two layers that share their weight each other's residual.

`init_lora_weights="pissa"` replaces the weight of a layer by its residual, in place. A second layer with the same weight
then decomposes the residual of the first layer, and both run on what is left. The model computes something else than
before. Seen in 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
model[1].weight = model[0].weight
x = torch.randn(4, 32)
before = model(x)
after = get_peft_model(model, LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights="pissa"))(x)
print(f"PiSSA changes the output of a model with tied layers by {(after - before).norm() / before.norm():.0%}")
