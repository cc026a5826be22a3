"""bitsandbytes' CPU decoder returns a vector of even length as a matrix of one row. A vector of odd length keeps its shape.

Seen in 0.50.2.
"""

import torch
from bitsandbytes import functional

for n in (64, 65):
    packed, state = functional.quantize_4bit(torch.ones(n), quant_type="nf4")
    print("in", (n,), "out", tuple(functional.dequantize_4bit(packed, state).shape))
