"""axolotl: the kernels raise for an input without tokens, because they call view(batch, tokens, -1). Seen in 0.19.0."""

import torch
from axolotl.kernels.lora import LoRA_O

layer = (torch.randn(8, 16), None, None, torch.randn(2, 16), torch.randn(8, 2), 1.0, None, None)
x = torch.randn(1, 0, 16)
print("nn.Linear:", tuple(torch.nn.Linear(16, 8)(x).shape))
try:
    print("LoRA_O:", tuple(LoRA_O.apply(x, None, *layer).shape))
except RuntimeError as error:
    print("LoRA_O raises", str(error).partition(" because")[0])
