"""galore-torch: `step(closure)` calls the closure under no_grad, so that `loss.backward()` raises in it. Seen in 1.0."""

import torch
from galore_torch import GaLoreAdamW

weight = torch.nn.Parameter(torch.randn(8, 6))
optimizer = GaLoreAdamW([weight], lr=0.1)


def closure():
    """Return the loss after computing its gradients."""
    loss = weight.square().sum()
    loss.backward()
    return loss


try:
    optimizer.step(closure)
    print("right: the closure computed gradients")
except RuntimeError as error:
    print(f"step(closure) raises: {error}")
