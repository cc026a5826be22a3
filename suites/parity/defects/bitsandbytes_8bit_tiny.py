"""bitsandbytes' CPU 8-bit quantiser multiplies by 1 / absmax, which is infinite for absmax below 2.9e-39.

Zeros are then decoded to -0.993 absmax, and all other numbers to the largest or smallest value. Seen in 0.50.2.
"""

import torch
from bitsandbytes import functional

x = torch.tensor([1e-39, -5e-40, 1e-40, 0.0])
codes, state = functional.quantize_blockwise(x, blocksize=64)
print("in", x.tolist(), "out", functional.dequantize_blockwise(codes, state).tolist())
