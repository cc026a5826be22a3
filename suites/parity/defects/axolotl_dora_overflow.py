"""axolotl: DoRA's kernels multiply x by the scaling before anything else, which overflows for large inputs.

`_lora_only` computes `s * X @ A @ B`; LoRA's kernel scales at the end. In float16, inputs of 5000 overflow with a scaling of
16. Seen in 0.19.0.
"""

import torch
from axolotl.kernels.lora import LoRA_O

torch.manual_seed(0)
W, A, B, m = torch.randn(8, 16) / 4, torch.randn(2, 16) / 400, torch.randn(8, 2) / 4, torch.full((8,), 0.1)
x = torch.randn(1, 3, 16).sign() * 5000
for name, magnitude in (("LoRA", None), ("DoRA", m)):
    for dtype in (torch.float32, torch.float16):
        given = [None if t is None else t.to(dtype) for t in (x, W, A, B, magnitude)]
        y = LoRA_O.apply(given[0], None, given[1], None, None, given[2], given[3], 16.0, None, given[4])
        print(f"{name}, {dtype}: largest output {float(y.abs().max()):.4g}")
