"""torchao's NF4 has levels of four decimals in the weight's dtype: numbers near a midpoint get other codes than in QLoRA.

In bfloat16 levels and quotients have eight bits, and about one code in two hundred differs. Seen in 0.18.0.
"""

import torch

try:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4
except ModuleNotFoundError:  # before 0.18
    from torchao.dtypes.nf4tensor import to_nf4

quantile = torch.distributions.Normal(0.0, 1.0).icdf
table = torch.cat([-quantile(torch.linspace(0.9677083, 0.5, 8)[:-1]), quantile(torch.linspace(0.5, 0.9677083, 9))])
table = table / table.max()  # QLoRA's sixteen levels
for dtype in (torch.float32, torch.bfloat16):
    W = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = to_nf4(W, 64, 256)
    codes = torch.stack([packed.quantized_data >> 4, packed.quantized_data & 15], dim=1).flatten()
    scaled = W.float() / W.float().abs().amax(dim=1, keepdim=True)  # a row is a block
    nearest = torch.bucketize(scaled.flatten(), (table[1:] + table[:-1]) / 2)
    largest = float((packed.nf4.float() - table).abs().max())
    print(dtype, "levels off by up to", largest, "; codes not nearest:", int((codes != nearest).sum()), "of", W.numel())
