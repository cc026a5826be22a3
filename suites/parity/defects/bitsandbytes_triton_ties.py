"""bitsandbytes' Triton kernels round ties of the 8-bit quantiser up, not down, and round FP4's midpoints to six decimals.

The other back ends of bitsandbytes round ties down. One FP4 midpoint is 0.583333 instead of 0.5833334, so a number
between the two gets the wrong code. The script runs in Triton's interpreter. Seen in 0.50.2.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from bitsandbytes.backends.triton import kernels_4bit, kernels_8bit_quant
from bitsandbytes.functional import create_dynamic_map, get_4bit_type

code = create_dynamic_map()
x = torch.ones(256)
x[1:] = (code[1:] + code[:-1]) / 2
codes, _ = kernels_8bit_quant.quantize_blockwise_triton(x, code, 256)
print("8-bit ties that go up:", int((codes[1:].int() == torch.arange(1, 256)).sum()), "of 255")

levels = get_4bit_type("fp4", device="cpu")[:8].sort().values
x = torch.ones(64)
x[1:8] = (levels[1:] + levels[:-1]) / 2
packed, absmax = torch.empty(64, 1, dtype=torch.uint8), torch.empty(2)
both = torch.cat([x, torch.zeros(64)])
kernels_4bit.quantize_4bit_blockwise_triton(both, 64, "fp4", 1, absmax, num_elements=128, quantized_out=packed)
codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()[1:8].long()
values = get_4bit_type("fp4", device="cpu")[codes]
print("FP4 ties", [round(t, 6) for t in x[1:8].tolist()], "go up:", (values > x[1:8]).tolist())
