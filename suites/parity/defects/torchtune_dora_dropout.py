"""torchtune: DoRALinear computes (gain - 1) W x without dropout on x; peft and the authors apply the dropout there too.

peft and the paper's authors compute W x + (g - 1) W d(x) + g s B A d(x) with one mask d. Without dropout the two are the
same. Seen in 0.6.1.
"""

import torch
from torch.nn.functional import dropout, linear
from torchtune.modules.peft import DoRALinear

for p in (0.0, 0.25):
    torch.manual_seed(0)
    layer = DoRALinear(16, 24, rank=4, alpha=8.0, dropout=p)
    layer.lora_b.weight.data.normal_()
    layer.magnitude.data.normal_()
    W, A, B, x = layer.weight, layer.lora_a.weight, layer.lora_b.weight, torch.randn(64, 16)
    torch.manual_seed(1)
    mine = layer(x)
    torch.manual_seed(1)
    dropped = dropout(x, p)
    g = layer.magnitude / (W + 2.0 * B @ A).norm(dim=1)
    right = linear(x, W) + (g - 1) * linear(dropped, W) + g * 2.0 * linear(linear(dropped, A), B)
    print(
        f"dropout {p}: relative difference to the authors' code", float(((mine - right).norm() / right.norm()).detach())
    )
