"""galore-torch: GaLoreAdamW8bit never moves a weight whose projected gradient has fewer than 4096 elements.

It passes percentile_clipping=100 and block_wise=True by position to an optimizer of bitsandbytes that no longer has these
arguments. The optimizer takes them for max_unorm and skip_zeros. max_unorm clips an update to 100 times the norm of the
parameter. During the step GaLore replaces the parameter by zeros, so the clipped update is zero. (Moments of larger
gradients have 8 bits, and their updates are not clipped.) After the step, p.grad is the projected gradient. Without
CUDA the step also raises, after it has replaced the weight. Seen with galore-torch 1.0 and bitsandbytes 0.50.2.
"""

from unittest.mock import patch

import torch
from galore_torch import GaLoreAdamW, GaLoreAdamW8bit

for name, kind in (("GaLoreAdamW", GaLoreAdamW), ("GaLoreAdamW8bit", GaLoreAdamW8bit)):
    for rank in (4, 64):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(256, 128))
        W = p.detach().clone()
        group = {"params": [p], "rank": rank, "update_proj_gap": 200, "scale": 1.0, "proj_type": "std"}
        optimizer = kind([group], lr=0.01, weight_decay=0.0)
        for _ in range(10):
            p.grad = torch.randn(256, 128)
            with patch("torch.cuda.synchronize"):
                optimizer.step()
        moved, grad = float((p.detach() - W).norm() / W.norm()), tuple(p.grad.shape)
        print(f"{name}, rank {rank}: ten steps moved the weight by {moved:.3g} (relative); now p.grad is {grad}")

p = torch.nn.Parameter(torch.randn(256, 128))
p.grad = torch.randn(256, 128)
try:
    GaLoreAdamW8bit([{"params": [p], "rank": 4, "update_proj_gap": 200, "scale": 1.0, "proj_type": "std"}]).step()
except (AssertionError, RuntimeError) as error:
    print(f"without CUDA: {error}; the weight was (256, 128) and is {tuple(p.shape)}, all zero: {not p.any()}")
