"""axolotl: DoRA's kernels divide m by the norm of each row, so a row of zeros gives NaN (0 / 0), as in peft.

For such a row, m starts as 0, and the gradient of m also divides by m. Seen in 0.19.0.
"""

import torch
from axolotl.kernels.lora import LoRA_O

torch.manual_seed(0)
W, x, A, B = torch.randn(10, 12), torch.randn(1, 2, 12), torch.randn(3, 12), torch.zeros(10, 3)
W[4] = 0
m = W.norm(dim=1)
A.requires_grad_(True)
y = LoRA_O.apply(x, None, W, None, None, A, B, 2.0, None, m)
print("output 4 of two tokens:", y[0, :, 4].tolist(), "(B is zero: should be 0, as without the adapter)")
y.sum().backward()
print("NaN in the gradient of A:", bool(A.grad.isnan().any()))
