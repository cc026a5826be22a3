"""peft: merging an adapter of one of two tied layers changes the other layer too.

Before the merge, the adapter acts on its own layer only. `merge_adapter` adds the update to the shared weight. peft
warns that tied layers "can lead to complications", but still merges. Seen in 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


class Tied(nn.Module):
    """Embedding and head with one weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        """Compute logits."""
        return self.head(self.embed(tokens))


torch.manual_seed(0)
tokens = torch.arange(9)
model = get_peft_model(Tied(), LoraConfig(r=2, target_modules=["head"], init_lora_weights=False))
unmerged = model(tokens)
model.merge_adapter()
print(f"merged, the logits are off by {float((model(tokens) - unmerged).norm() / unmerged.norm()):.2g} (should be 0)")
