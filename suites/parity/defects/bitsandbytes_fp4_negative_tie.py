"""bitsandbytes' FP4 on a CPU rounds a positive tie to the smaller magnitude, but a negative tie to the larger one.

bitsandbytes' CUDA and Triton kernels encode sign and magnitude separately, and round both ties to the smaller
magnitude. Seen in 0.50.2.
"""

import torch
from bitsandbytes import functional

x = torch.zeros(64)
x[:3] = torch.tensor([1.0, 0.4166666865348816, -0.4166666865348816])  # halfway between 1/3 and 1/2
packed, state = functional.quantize_4bit(x, blocksize=64, quant_type="fp4")
print("in", x[1:3].tolist(), "out", functional.dequantize_4bit(packed, state).flatten()[1:3].tolist())
