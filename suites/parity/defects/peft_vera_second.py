"""peft: VeRA beside another VeRA adapter of larger rank raises in its forward pass; with rank 1, its output is wrong.

Both adapters use A and B of the first one. A layer slices A and B to its sizes, but not to the rank of the second
adapter. peft intends to support a smaller rank: its own check refuses only a larger one. Seen in 0.21.2.
"""

import torch
from peft import VeraConfig, get_peft_model
from torch import nn

x = torch.randn(5, 64)
for first, rank in ((8, 8), (8, 4), (8, 1), (4, 8)):
    model = get_peft_model(nn.Sequential(nn.Linear(64, 48)), VeraConfig(r=first, target_modules=["0"]), "first")
    try:
        model.add_adapter("second", VeraConfig(r=rank, target_modules=["0"]))
        model.set_adapter("second")
        nn.init.ones_(model.base_model.model[0].vera_lambda_b["second"])
        update = model(x) - model.base_model.model[0].base_layer(x)
    except (RuntimeError, ValueError) as error:
        print(f"r={rank} beside r={first}: {type(error).__name__}: {str(error)[:90]}")
    else:
        found = int(torch.linalg.matrix_rank(update))
        print(f"r={rank} beside r={first}: runs; rank of the update {found}, should be {min(rank, len(x))}")
