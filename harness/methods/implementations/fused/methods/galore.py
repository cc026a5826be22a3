"""GaLore without temporaries of the weight's size and, except in float64, without a full SVD.

For a gradient in float32 or a narrower dtype, the singular vectors come from the eigenvectors of the smaller Gram
matrix in float64. float64 holds the products of float32 numbers exactly. So the squared singular values are as precise
as the values of an SVD in float32. For a float64 gradient, LAPACK computes a full SVD.

The randomised SVD (niter > 0) begins with the same sketch as the reference. It computes a basis by Cholesky
factorisation in float64. If the columns are nearly linearly dependent, it uses Householder reflections, like the
reference. The two ways give bases of the same space.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from harness.kernels.torch.galore_step import adam_step_, galore_step_, refreshed
from reference import galore
from reference.shared import galore_moments


class GaLore(galore.GaLore):
    """The reference's optimizer, with steps by the functions `galore_step_` and `adam_step_` of `harness/kernels`.

    A refresh of the projector does not change the moments.
    """

    @torch.no_grad()
    def update(self, p: Tensor, G: Tensor, group: dict[str, Any]) -> None:
        """Update the parameter p by one step, with the gradient G."""
        state, rank = self.state[p], group["rank"]
        steps = state.get("step", 0)
        if rank and steps % group["update_gap"] == 0:
            P, Q = refreshed(G, rank, group["side"], group["niter"], state.get("P"), state.get("Q"))
            state |= {name: t for name, t in (("P", P), ("Q", Q)) if t is not None}
        P, Q = state.get("P"), state.get("Q")
        if "M" not in state:
            state |= galore_moments.zeros(galore.project(G, galore.Projector(P, Q)).contiguous(), group["bits"])
        state["step"] = steps + 1
        options = {name: group[name] for name in ("lr", "eps", "weight_decay")}
        options |= {name: state.get(name) for name in ("M_absmax", "V_absmax")}
        options |= {"step": state["step"], "betas": (group["beta1"], group["beta2"])}
        if rank:
            galore_step_(p, G, P, Q, state["M"], state["V"], scale=group["scale"], **options)
        else:
            adam_step_(p, G, state["M"], state["V"], **options)


class FusedGaLoreModel(galore.GaLoreModel):
    """A model whose weights are trained by the fused GaLore."""

    def optimizer(self, lr: float, weight_decay: float, bits: int = 32) -> galore.GaLore:
        """Return the fused optimizer with the parameter groups of the reference."""
        optimizer = super().optimizer(lr, weight_decay, bits)
        optimizer.__class__ = GaLore  # the state stays the same; only the step differs
        return optimizer


def attach(model: nn.Module, config: galore.Config, generator: torch.Generator) -> galore.GaLoreModel:
    """Prepare the model as the reference does, and return it with the fused optimizer."""
    adapted = galore.attach(model, config, generator)
    adapted.__class__ = FusedGaLoreModel
    return adapted
