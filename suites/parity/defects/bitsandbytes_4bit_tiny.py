"""bitsandbytes' CPU 4-bit quantiser divides by at least 1e-38, so a block of smaller numbers gets codes that are too small.

The stored absmax is right, so the decoded numbers are several times too small. Seen in 0.50.2.
"""

import torch
from bitsandbytes import functional

x = torch.zeros(64)
x[:2] = torch.tensor([5e-39, -5e-39])
for kind in ("nf4", "fp4"):
    packed, state = functional.quantize_4bit(x, blocksize=64, quant_type=kind)
    print(
        kind,
        "in",
        x[:2].tolist(),
        "out",
        functional.dequantize_4bit(packed, state)[0, :2].tolist(),
        "absmax",
        state.absmax.item(),
    )
