"""bitsandbytes: LAMB8bit takes the same step as AdamW8bit, without the trust ratio of LAMB.

The norm of a step should be lr times the norm of the tensor. The 8-bit kernels do not know the norm of an update;
LAMB8bit documents this at `max_unorm`. Seen in 0.50.2.
"""

import bitsandbytes
import torch

for size in (0.01, 1.0, 100.0):
    for kind in (bitsandbytes.optim.LAMB8bit, bitsandbytes.optim.AdamW8bit):
        torch.manual_seed(0)
        p = torch.nn.Parameter(size * torch.randn(4096))
        p.grad, before = torch.randn(4096), p.detach().clone()
        kind([p], lr=0.1, weight_decay=0.0).step()
        step = (p.detach() - before).norm()
        print(
            f"{kind.__name__}: a tensor of norm {before.norm():.4g} moves by {step:.4g}; LAMB: {0.1 * before.norm():.4g}"
        )
