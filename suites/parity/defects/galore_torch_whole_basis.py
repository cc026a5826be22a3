"""galore-torch: the projector keeps all singular vectors of a gradient in memory, not only the first `rank`. Seen in 1.0."""

import torch
from galore_torch import GaLoreAdamW

weight = torch.nn.Parameter(torch.randn(256, 256))
group = {"params": [weight], "rank": 4, "update_proj_gap": 200, "scale": 1.0, "proj_type": "std"}
optimizer = GaLoreAdamW([group], lr=0.1)
weight.grad = torch.randn(256, 256)
optimizer.step()
basis = optimizer.state[weight]["projector"].ortho_matrix
own, kept = basis.numel() * basis.element_size(), basis.untyped_storage().nbytes()
if kept == own:
    print("right: the projector keeps only its own vectors")
else:
    print(f"the projection matrix has {own:,} bytes, and its storage {kept:,}")
