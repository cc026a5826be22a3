"""peft: target_parameters adds the update to the experts' weights, so in bfloat16 each element of W + dW is rounded.

LoRA of a linear layer computes W x and B A x separately, and rounds only their results. Seen in 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


class Experts(nn.Module):
    """Three experts in one parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 48, 512) / 512**0.5)

    def forward(self, x):
        """Return the output of each expert in float64, so that only the weights are rounded."""
        return torch.einsum("koi,ti->kto", self.weight.double(), x.double())


torch.manual_seed(0)
config = LoraConfig(r=1, lora_alpha=1, target_modules=[], target_parameters=["0.weight"], init_lora_weights=False)
model = get_peft_model(nn.Sequential(Experts()), config, autocast_adapter_dtype=False).bfloat16()
x = torch.randn(9, 512).bfloat16()
with torch.no_grad():
    rounded, exact = model(x), model.double()(x)
error = float((rounded - exact).norm() / exact.norm())
print("error of the output because W + dW is rounded:", error, "(0 if W x and B A x are computed separately)")
