"""galore-torch with proj_type=reverse_std raises if m < n and the rank is m.

project_back guesses the side from the shape of the projected gradient, which is (m, rank) and therefore square. Seen in
1.0.
"""

import torch
from galore_torch.galore_projector import GaLoreProjector

G = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
for rank in (3, 4):
    projector = GaLoreProjector(rank=rank, proj_type="reverse_std")
    R = projector.project(G, 0)
    try:
        print("rank", rank, "R", tuple(R.shape), "back", tuple(projector.project_back(R).shape))
    except RuntimeError as error:
        print("rank", rank, "R", tuple(R.shape), "RuntimeError:", error)
