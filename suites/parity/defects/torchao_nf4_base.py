"""torchao: NF4 with double quantisation differs from that of QLoRA and bitsandbytes.

torchao's levels have four decimals, and the weight's dtype. It stores the absmax of each block as int8 on a linear
grid, and clips the largest value, 128, to 127. QLoRA stores 8-bit floats. So the same bytes are decoded to different
weights by torchao and by bitsandbytes. Seen in 0.18.0.
"""

import torch

try:
    from torchao.quantization.quantize_.workflows.nf4 import nf4_tensor
except ModuleNotFoundError:  # before 0.18
    from torchao.dtypes import nf4tensor as nf4_tensor

torch.manual_seed(0)
W = torch.randn(256, 256) * 10.0 ** torch.randn(256, 1).mul(0.3)
packed = nf4_tensor.to_nf4(W, 64, 256)
absmax = W.view(-1, 64).abs().amax(1)
decoded = packed.dequantize_scalers(packed.quantized_scalers, packed.quantization_factor, 256)
worst = int((decoded - absmax).abs().argmax())
for name, i in (("the worst", worst), ("the largest", int(absmax.argmax()))):
    print(f"{name} absmax, {absmax[i]:.5g}, comes back as {decoded[i]:.5g}")
# QLoRA's levels, of which QLoRA's appendix E has all digits.
exact = torch.tensor([0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
                      0.44070982933044434, 0.5626170039176941, 0.7229568362236023])  # fmt: skip
print("levels off by", [f"{float(d):.1e}" for d in packed.nf4[8:15] - exact])
