"""bitsandbytes' CPU dequantiser reads the packed codes as if they were contiguous, whatever their strides.

If the codes are every second element of a larger tensor, the decoder silently uses the elements in between. Seen in 0.50.2.
"""

import torch
from bitsandbytes import functional

x = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
packed, state = functional.quantize_4bit(x, blocksize=64, quant_type="nf4")
right = functional.dequantize_4bit(packed, state)
gaps = torch.stack([packed, torch.zeros_like(packed)], dim=1)[:, 0]
wrong = functional.dequantize_4bit(gaps, state)
print("the same bytes with a stride of 2:", bool((gaps == packed).all()))
print("values that differ:", int((wrong != right).sum()), "of", x.numel(), "- should be 0")
