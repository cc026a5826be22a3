"""torchtune: DoRALinear multiplies the bias by the gain m / ||V|| too, as soon as the gain is not 1.

Its (gain - 1) * base_out contains the bias, so the bias becomes gain * bias. The merged checkpoint keeps the bias, so its
output differs from that of the trained layer. In arXiv:2402.09353 and in peft the bias stays as it is. Seen in 0.6.1.
"""

import torch
from torchtune.modules.peft import DoRALinear, get_merged_lora_ckpt

torch.manual_seed(0)
x = torch.randn(5, 16)
for bias in (False, True):
    layer = DoRALinear(16, 24, rank=4, alpha=8.0, use_bias=bias)
    layer.initialize_dora_magnitude()
    layer.magnitude.data.mul_(2)
    merged = get_merged_lora_ckpt({f"l.{n}": t.clone() for n, t in layer.state_dict().items()}, 4, 8.0)
    right = torch.nn.functional.linear(x, merged["l.weight"], layer.bias)
    error = float((layer(x) - right).detach().norm() / right.detach().norm())
    print(f"{'a' if bias else 'no'} bias: relative difference of layer and merged layer", error)
