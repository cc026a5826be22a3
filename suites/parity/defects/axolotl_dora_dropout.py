"""axolotl: DoRA's kernels apply the gain to W x without dropout on x; peft and the authors apply the dropout there too.

The kernel replaces a layer of peft. peft and the paper's authors compute W x + (g - 1) W d(x) + g s B A d(x) + bias with
one mask d. The kernel computes g (W x + s B A d(x)) + bias. Without dropout the two are the same. Seen in 0.19.0.
"""

import torch
from axolotl.kernels.lora import LoRA_O
from torch.nn.functional import dropout, linear

torch.manual_seed(0)
W, x = torch.randn(24, 16) / 4, torch.randn(1, 64, 16)
A, B, m = torch.randn(4, 16) / 4, torch.randn(24, 4) / 2, torch.randn(24)
V = W + 2.0 * B @ A
g = m / V.norm(dim=1)
for p in (0.0, 0.25):
    dropped = dropout(x, p)
    mine = LoRA_O.apply(x, dropped, W, None, None, A, B, 2.0, None, m)
    right = linear(x, W) + (g - 1) * linear(dropped, W) + g * 2.0 * linear(linear(dropped, A), B)
    print(f"dropout {p}: relative difference to the authors' code", float((mine - right).norm() / right.norm()))
