"""peft: merging an adapter of an embedding changes the output layer that is tied to it.

Before the merge, the adapter acts on the embedding only. `merge_adapter` adds the update to the table, which the output
layer uses too. peft warns that tied layers "can lead to complications", but still merges. Seen in 0.21.2.
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
model = get_peft_model(Tied(), LoraConfig(r=2, target_modules=["embed"], init_lora_weights=False))
x = torch.randn(5, 4)
unmerged = model.base_model.model.head(x)
model.merge_adapter()
error = float((model.base_model.model.head(x) - unmerged).norm() / unmerged.norm())
print(f"the output layer has no adapter, but after merging its logits are off by {error:.2g} (should be 0)")
