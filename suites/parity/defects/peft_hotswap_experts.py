"""peft: `hotswap_adapter` to a smaller rank mixes up the experts of an adapter with target_parameters.

A has the rows of one expert after another. The smaller tensor is written into the first rows of the larger one, and the
rest is set to zero, so the rows of the second expert become rows of the first. B is stored rank by rank, so B is
written correctly. Seen in 0.21.2.
"""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn


class Experts(nn.Module):
    """Three experts in one parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 5, 4))

    def forward(self, x):
        """Return the output of each expert."""
        return torch.einsum("koi,ti->kto", self.weight, x)


def adapted(rank):
    """Return a model with an adapter of this rank."""
    model = nn.Sequential(Experts())
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=[], target_parameters=["0.weight"], init_lora_weights=False
    )
    return get_peft_model(model, config)


torch.manual_seed(0)
x, right = torch.randn(2, 4), adapted(rank=1)
for rank in (1, 2):
    model = adapted(rank)
    with tempfile.TemporaryDirectory() as folder:
        right.save_pretrained(folder)
        hotswap_adapter(model, folder, "default", torch_device="cpu")
    error = (model(x) - right(x)).flatten(1).norm(dim=1) / right(x).flatten(1).norm(dim=1)
    print(f"in a slot of rank {rank}, the experts are off by {[round(e, 2) for e in error.tolist()]} (should be 0)")
