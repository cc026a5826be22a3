"""bitsandbytes' CPU dequantisers read the constants as if they were contiguous, whatever their strides.

An absmax that is not contiguous is neither copied nor refused. If absmax is every second element of a larger tensor, the
decoder silently uses the elements in between. Seen in 0.50.2.
"""

import torch
from bitsandbytes import functional

x = torch.randn(256, generator=torch.Generator().manual_seed(0))
packed, state = functional.quantize_4bit(x, blocksize=64, quant_type="nf4")
right = functional.dequantize_4bit(packed, state).flatten()
state.absmax = torch.stack([state.absmax, torch.full_like(state.absmax, torch.nan)], dim=1)[:, 0]
wrong = functional.dequantize_4bit(packed, state).flatten()
print("nf4: the same constants with a stride of 2 give NaN in", int(wrong.isnan().sum()), "of 256, should be 0")
print("absmax is the same:", bool((state.absmax == x.view(4, 64).abs().amax(1)).all()), "right:", right[64:67].tolist())

codes, state = functional.quantize_blockwise(x, blocksize=64)
state.absmax = torch.stack([state.absmax, torch.full_like(state.absmax, torch.nan)], dim=1)[:, 0]
wrong = functional.dequantize_blockwise(codes, state)
print("8 bits: NaN in", int(wrong.isnan().sum()), "of 256, should be 0")
