"""bitsandbytes' CPU 8-bit quantiser looks x / absmax up in 65,536 bins of [-1, 1], so it misses the nearest code.

Some of the 256 codes are never used. Double quantisation and 8-bit optimizers use this quantiser. Seen in 0.50.2. On
CUDA the quantiser finds the nearest code.
"""

import torch
from bitsandbytes import functional

for signed in (True, False):
    code = functional.create_dynamic_map(signed)
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    x = x if signed else x.square()
    codes, state = functional.quantize_blockwise(x, code=code, blocksize=256)
    nearest = torch.bucketize(x / state.absmax.repeat_interleave(256), (code[1:] + code[:-1]) / 2)
    off = (codes.long() - nearest).abs()
    reached = functional.quantize_blockwise(torch.cat([code, code[-1:]]), code=code, blocksize=257)[0].unique()
    print("signed" if signed else "unsigned", "not nearest:", int((off > 0).sum()), "of", len(x), "by up to", int(off.max()),
          "codes; reachable:", len(reached), "of 256")  # fmt: skip
