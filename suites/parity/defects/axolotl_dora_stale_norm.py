"""axolotl: DoRA's kernels keep the norm ||W + s B A|| of the first step if the optimizer is fused.

`_compute_dora_scale` keeps the norm on the magnitude until the `_version` of A or B changes. torch's fused optimizers (the
default of transformers and of Axolotl) and those of bitsandbytes change A and B, but not `_version`. So every step after the
first trains with an old norm, and the saved adapter computes other outputs than the trained model. Seen in 0.19.0.
"""

import torch
from axolotl.kernels.lora import LoRA_O
from torch.nn.functional import linear


def trained(*, fused: bool) -> float:
    """Return the relative error of the kernel's output after 20 steps, against DoRA's formula with the same tensors."""
    torch.manual_seed(0)
    W, x, target = torch.randn(24, 16) / 4, torch.randn(1, 64, 16), torch.randn(1, 64, 24)
    A, B, m = torch.randn(4, 16) / 4, torch.zeros(24, 4), W.norm(dim=1)
    tensors = [t.requires_grad_(True) for t in (A, B, m)]
    optimizer = torch.optim.AdamW(tensors, lr=1e-2, fused=fused)
    for _ in range(20):
        optimizer.zero_grad()
        (LoRA_O.apply(x, None, W, None, None, A, B, 2.0, None, m) - target).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        mine = LoRA_O.apply(x, None, W, None, None, A, B, 2.0, None, m)
        V = W + 2.0 * B @ A
        right = linear(x, V * (m / V.norm(dim=1))[:, None])
        return float((mine - right).norm() / right.norm())


for fused in (False, True):
    print(f"AdamW(fused={fused}): relative error of the output after 20 steps", trained(fused=fused))
