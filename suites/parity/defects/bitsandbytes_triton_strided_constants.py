"""bitsandbytes' Triton dequantiser reads the constants as if they were contiguous, whatever their strides.

Neither the operator (backends/triton/ops.py) nor the kernel checks the strides. If the constants are every second element
of a larger tensor, the kernel uses the elements in between. The script runs in Triton's interpreter. Seen in 0.50.2.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from bitsandbytes.backends.triton import kernels_4bit

packed, absmax = torch.full((128, 1), 0xF1, dtype=torch.uint8), torch.ones(4)
gaps = torch.stack([absmax, torch.full_like(absmax, torch.nan)], dim=1)[:, 0]
for name, constants in (("contiguous", absmax), ("with a stride of 2", gaps)):
    W = torch.empty(256)
    kernels_4bit.dequantize_4bit_impl(packed, constants, 64, "nf4", torch.float32, out=W)
    print(name, "NaN in", int(W.isnan().sum()), "of 256, should be 0")
