"""On CPUs with AVX512-BF16 Linear4bit in eval mode ignores compute_dtype and computes in bfloat16.

To do so, it repacks the weight permanently. If the layer trains again later, a backward pass silently gives the input no
gradient. Seen in 0.50.2.
"""

import bitsandbytes
import torch

print("AVX512-BF16:", bool(bitsandbytes.functional.has_avx512bf16()))
torch.manual_seed(0)
layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
x = torch.randn(8, 128)
trained = layer.train()(x).detach()
evaluated = layer.eval()(x).detach()
print("eval against train:", float((evaluated - trained).norm() / trained.norm()), "; float32's eps is 1.2e-7")
layer.train()(x.requires_grad_()).sum().backward()
print("in training again, the gradient of the input is missing:", x.grad is None)
