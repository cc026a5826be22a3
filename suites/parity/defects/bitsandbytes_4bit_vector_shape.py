"""bitsandbytes' CPU decoder gives a vector of even length back as a matrix of one row; an odd one stays a vector.

Seen in 0.50.2.
"""

import torch
from bitsandbytes import functional

for n in (64, 65):
    packed, state = functional.quantize_4bit(torch.ones(n), quant_type="nf4")
    print("in", (n,), "out", tuple(functional.dequantize_4bit(packed, state).shape))
