"""bitsandbytes mistakes a packed weight of one byte for a transposed one, and decodes a (2, 1) weight to (1, 2).

dequantize_4bit transposes its result whenever the packed tensor has one row, and (2, 1) is packed into (1, 1). Seen in
0.50.2.
"""

import torch
from bitsandbytes import functional

for shape in ((1, 2), (2, 1), (4, 1)):
    packed, state = functional.quantize_4bit(torch.ones(shape), quant_type="nf4")
    print("in", shape, "packed", tuple(packed.shape), "out", tuple(functional.dequantize_4bit(packed, state).shape))
