"""loralib: merging an adapter of an embedding changes the output layer that is tied to it.

In eval mode, `loralib.Embedding` adds the update to its table, which the output layer uses too. Seen in 0.1.2.
"""

import loralib
import torch
from torch import nn

torch.manual_seed(0)
embed, head = loralib.Embedding(9, 4, r=2), nn.Linear(4, 9, bias=False)
head.weight = embed.weight
nn.init.normal_(embed.lora_A)
nn.init.normal_(embed.lora_B)
x = torch.randn(5, 4)
unmerged = head(x)
embed.eval()
error = float((head(x) - unmerged).norm() / unmerged.norm())
print(f"the output layer has no adapter, but after merging its logits are off by {error:.2g} (should be 0)")
