"""peft: a LoRA of stacked experts replaces the weight while it computes, so calls in two threads raise or compute wrongly.

Every call parametrizes the experts' weights and removes the parametrization at its end. Another thread then finds the
weights parametrized twice, or not at all. Seen in 0.21.2.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


class Experts(nn.Module):
    """Three experts in one parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 48, 512) / 512**0.5)

    def forward(self, x):
        """Return the output of each expert."""
        return torch.einsum("koi,ti->kto", self.weight, x)


torch.manual_seed(0)
config = LoraConfig(r=1, lora_alpha=1, target_modules=[], target_parameters=["0.weight"], init_lora_weights=False)
model = get_peft_model(nn.Sequential(Experts()), config)
x = torch.randn(9, 512)
right, wrong, raised = model(x), 0, set()
with ThreadPoolExecutor(2) as threads:
    for call in [threads.submit(model, x) for _ in range(200)]:
        try:
            wrong += not torch.equal(call.result(), right)
        except Exception as error:  # noqa: BLE001  # whatever the race raises
            raised.add(f"{type(error).__name__}: {error}")
print(
    f"of 200 calls in two threads, {wrong} return another output; raised:", *sorted(raised) or ["nothing"], sep="\n  "
)
