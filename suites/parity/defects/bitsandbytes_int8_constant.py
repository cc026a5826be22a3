"""bitsandbytes: outside of CUDA, int8_mm_dequant multiplies by 6.200124e-05 in place of 1 / 127^2 = 6.200012e-05.

So each output of a Linear8bitLt in eval mode is too large by 1.8e-5 of its value, before the bias is added. This is 150
units in the last place of float32. bfloat16 and float16 hide it. Training mode on the CPU uses no such product, and the
CUDA kernel has the right constant. Seen in 0.50.2.
"""

import bitsandbytes  # noqa: F401  # registers the operation
import torch

codes = torch.full((1, 1), 127 * 127, dtype=torch.int32)
one = torch.ones(1)
y = torch.ops.bitsandbytes.int8_mm_dequant(codes, one, one, dtype=torch.float32)
print(f"127 x 127 codes with an absmax of 1: {float(y):.7f} (should be 1)")
