"""bitsandbytes' Linear4bit in eval mode reads its input as if it were contiguous, whatever its strides: the output is wrong.

This happens only on CPUs with AVX512-BF16, where a separate kernel multiplies by the repacked weight. In training mode, and
on other CPUs, the output is right. Seen in 0.50.2.
"""

import torch
from bitsandbytes import nn

torch.manual_seed(0)
layer = nn.Linear4bit(256, 96, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu").eval()
x = torch.randn(32, 256, dtype=torch.bfloat16)
transposed = x.T.contiguous().T  # the same numbers
with torch.no_grad():
    right, wrong = layer(x).float(), layer(transposed).float()
print("equal inputs:", bool((x == transposed).all()))
print("relative difference of the outputs:", float((right - wrong).norm() / right.norm()), "should be about 0")
