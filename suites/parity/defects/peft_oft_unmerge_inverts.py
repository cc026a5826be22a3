"""peft: merging OFT and unmerging it leaves W R^-1 R instead of the base weight: off by up to 1e-7 even in float64.

Unmerging multiplies by an inverse that is computed in float32. With the Cayley-Neumann series, R is only nearly
orthogonal. It can even be singular, and then nothing can restore the weight, because peft keeps no copy of the weight.
Seen in 0.21.2.
"""

import torch
from peft import OFTConfig, get_peft_model
from torch import nn

for dtype in (torch.float64, torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32, dtype=dtype))
    layer = get_peft_model(model, OFTConfig(oft_block_size=8, target_modules=["0"])).base_model.model[0]
    nn.init.normal_(layer.oft_R["default"].weight, std=0.3)
    before = layer.get_base_layer().weight.detach().clone()
    layer.merge()
    layer.unmerge()
    error = (layer.get_base_layer().weight.detach() - before).norm() / before.norm()
    print(f"{dtype}: the base weight is off by {error:.1e} of its size")
