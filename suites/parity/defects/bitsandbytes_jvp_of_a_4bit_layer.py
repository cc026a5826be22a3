"""bitsandbytes: torch.func.jvp through a 4-bit layer silently gives a derivative of zero. Seen in 0.50.2 on a CPU."""

import torch
from bitsandbytes.nn import Linear4bit

layer = Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32).to("cpu")
x, direction = torch.randn(5, 64), torch.randn(5, 64)
layer(x)  # packs the weight
_, derivative = torch.func.jvp(layer, (x,), (direction,))
print("derivative along a direction:", derivative[0, :3].tolist())
print("the layer is linear, so it is", layer(direction)[0, :3].tolist())
