"""torchtune: DoRALinear divides m by the norm of each row, so a row of zeros gives NaN (0 / 0), as in peft.

Seen in 0.6.1.
"""

import torch
from torchtune.modules.peft import DoRALinear

torch.manual_seed(0)
layer = DoRALinear(12, 10, rank=3, alpha=6.0)
layer.weight.data[4] = 0
layer.initialize_dora_magnitude()
y = layer(torch.randn(2, 12))
print("output 4 of two tokens:", y[:, 4].tolist(), "(B is zero: should be 0, as without the adapter)")
y.sum().backward()
print("NaN in the gradient of A:", bool(layer.lora_a.weight.grad.isnan().any()))
