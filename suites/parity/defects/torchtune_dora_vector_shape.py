"""torchtune: the output of DoRALinear for a single vector has one dimension too many, as in peft. Seen in 0.6.1."""

import torch
from torchtune.modules.peft import DoRALinear, LoRALinear

x = torch.randn(12)
for kind in (LoRALinear, DoRALinear):
    print(kind.__name__, tuple(kind(12, 10, rank=3, alpha=6.0)(x).shape))
