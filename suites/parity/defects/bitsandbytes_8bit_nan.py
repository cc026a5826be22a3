"""bitsandbytes' CPU 8-bit quantiser encodes NaN as -0.993 times the absmax of its block. The absmax ignores the NaN.

So a NaN in a gradient disappears in the moments of an 8-bit optimizer. Seen in 0.50.2.
"""

import torch
from bitsandbytes import functional

codes, state = functional.quantize_blockwise(torch.tensor([float("nan"), 1.0, -2.0, 0.5]), blocksize=64)
print("absmax", state.absmax.tolist(), "decoded", functional.dequantize_blockwise(codes, state).tolist())
