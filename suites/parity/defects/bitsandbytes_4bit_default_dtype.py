"""bitsandbytes: 4-bit quantisers keep the thresholds of their first call in torch's default dtype, and later calls use them.

transformers loads a model in bfloat16 while bfloat16 is the default dtype. On a CPU every weight that the process later
quantises then gets other codes near a threshold. Seen in 0.50.2.
"""

import torch
from bitsandbytes import functional
from bitsandbytes.backends import utils
from bitsandbytes.backends.default import ops

W = torch.randn(4096, generator=torch.Generator().manual_seed(0))
for kind in ("nf4", "fp4"):
    right, _ = functional.quantize_4bit(W, blocksize=64, quant_type=kind)
    ops._get_4bit_quantize_bounds.cache_clear()  # as in a new process
    utils._code_4bit_cache.clear()
    torch.set_default_dtype(torch.bfloat16)
    functional.quantize_4bit(torch.ones(64), blocksize=64, quant_type=kind)
    torch.set_default_dtype(torch.float32)
    later, _ = functional.quantize_4bit(W, blocksize=64, quant_type=kind)
    print(
        kind,
        (later != right).sum().item(),
        "of",
        right.numel(),
        "bytes differ after a call under bfloat16 (should be 0)",
    )
