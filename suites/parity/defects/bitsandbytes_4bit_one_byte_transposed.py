"""bitsandbytes takes a packed weight of one byte for a transposed one, and gives a column of two back as a row.

dequantize_4bit turns its result round wherever the packed tensor has one row; (2, 1) packs into (1, 1). Seen in 0.50.2.
"""

import torch
from bitsandbytes import functional

for shape in ((1, 2), (2, 1), (4, 1)):
    packed, state = functional.quantize_4bit(torch.ones(shape), quant_type="nf4")
    print("in", shape, "packed", tuple(packed.shape), "out", tuple(functional.dequantize_4bit(packed, state).shape))
