"""bitsandbytes: FP4 keeps the thresholds of its first call in torch's default dtype, and later calls use them.

transformers loads a model in bfloat16 while bfloat16 is the default dtype. On a CPU every weight that the process later
quantises to FP4 then gets other codes near a threshold. Seen in 0.50.2.
"""

import subprocess
import sys

import torch
from bitsandbytes import functional

W = torch.randn(4096, generator=torch.Generator().manual_seed(0))
if len(sys.argv) > 1:
    torch.set_default_dtype(torch.bfloat16)
    functional.quantize_4bit(torch.ones(64), blocksize=64, quant_type="fp4")
    torch.set_default_dtype(torch.float32)
packed, _ = functional.quantize_4bit(W, blocksize=64, quant_type="fp4")
if len(sys.argv) > 1:
    print(packed.flatten().tolist())
else:
    other = subprocess.run([sys.executable, __file__, "after"], capture_output=True, text=True, check=True).stdout
    codes = torch.tensor(list(map(int, other.strip().strip("[]").split(","))), dtype=torch.uint8)
    differing = (codes != packed.flatten()).sum().item()
    print(differing, "of", codes.numel(), "bytes differ after a call under bfloat16 (should be 0)")
