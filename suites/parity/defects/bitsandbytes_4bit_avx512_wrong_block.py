"""With AVX-512 bitsandbytes' CPU decoder uses the absmax of another block if a row does not consist of whole blocks.

For rows of n elements, n a multiple of 16, it reads absmax[row * (n // block) + column // block]: n // block loses the
remainder, so every row but the first uses constants of earlier rows. For other n, and for blocks of 2048 or more, other
code decodes the weight correctly. Linear4bit uses the decoder in its forward and backward pass. Seen in 0.50.2, on CPUs
with AVX-512 only.
"""

import torch
from bitsandbytes import functional

print("this CPU:", torch.backends.cpu.get_cpu_capability())
for shape, block in (((8, 64), 64), ((8, 96), 64), ((8, 100), 64), ((8, 64), 128)):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 9.0)[:, None]
    packed, state = functional.quantize_4bit(W, blocksize=block, quant_type="nf4")
    have = functional.dequantize_4bit(packed, state)
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()[: W.numel()].long()
    want = (state.code[codes] * state.absmax.repeat_interleave(block)[: W.numel()]).view(shape)
    theirs = torch.arange(8)[:, None] * (shape[1] // block) + torch.arange(shape[1]) // block
    guess = state.code[codes].view(shape) * state.absmax[theirs.clamp(max=len(state.absmax) - 1)]
    wrong = int((have != want).sum())
    print(shape, "block", block, "wrong:", wrong, "of", W.numel(), "explained:", not wrong or torch.equal(have, guess))
