"""galore-torch computes the singular vectors of a float64 gradient in float32, so its projector is orthonormal only to 1e-7.

Seen in 1.0.
"""

import torch
from galore_torch.galore_projector import GaLoreProjector

G = torch.randn(64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
projector = GaLoreProjector(rank=8, proj_type="std")
projector.project(G, 0)
P, U = projector.ortho_matrix, torch.linalg.svd(G, full_matrices=False).U[:, :8]
for name, basis in (("galore-torch", P), ("torch.linalg.svd", U)):
    print(name, basis.dtype, "|P'P - I|", float((basis.T @ basis - torch.eye(8, dtype=torch.float64)).abs().max()))
