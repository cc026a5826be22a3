"""loralib: merging two layers that share their weight adds both updates to it.

`eval()` merges in place. Each layer then computes with the update of the other layer too. Seen in 0.1.2.
"""

import loralib
import torch
from torch import nn

torch.manual_seed(0)
model = nn.ModuleList(loralib.Linear(8, 8, r=2) for _ in range(2))
model[1].weight = model[0].weight
for layer in model:
    nn.init.normal_(layer.lora_B)
x = torch.randn(4, 8)
before = [layer(x).detach() for layer in model]
model.eval()
for n, layer in enumerate(model):
    print(f"layer {n}: merging changes the output by {(layer(x) - before[n]).norm() / before[n].norm():.0%}")
