"""loralib: `eval()` adds the update to the weight in place and `train()` subtracts it, which leaves a rounding error.

The restored weight differs from the frozen one by about the rounding error of the larger of W and the update. Each further
round trip may add an error. The defect is as old as merging in loralib. Seen in 0.1.2.
"""

import loralib
import torch

for dtype in (torch.float32, torch.float16):
    for alpha in (8, 512):
        torch.manual_seed(0)
        layer = loralib.Linear(64, 48, r=4, lora_alpha=alpha, dtype=dtype)
        torch.nn.init.normal_(layer.lora_B, std=0.1)
        W = layer.weight.detach().clone()
        layer.eval()
        layer.train()
        error = float((layer.weight.double() - W.double()).norm() / W.double().norm())
        share = float((layer.weight != W).double().mean())
        print(f"{dtype}, alpha={alpha}: after eval() and train() {share:.0%} of W differ, by {error:.2g} of W")
