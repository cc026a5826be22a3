"""GaLore as an optimizer: AdamW in a subspace for groups with a rank, plain AdamW for others; moments may have 8 bits."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from harness.kernels.torch.adamw8bit_step import init_state
from harness.kernels.torch.galore_step import adam_step_, galore_step_, refreshed, sides
from harness.kernels.torch.optimizers.adamw8bit import restore_dtypes


def check_group(group: dict[str, Any]) -> None:
    """Raise ValueError, which names the knob and its range, for a group of parameters that no step can be taken with."""
    for name, least in (("rank", 0), ("update_gap", 1), ("niter", 0)):
        if not isinstance(group[name], Integral) or group[name] < least:
            raise ValueError(f"GaLore's {name} is a whole number of at least {least}, got {group[name]!r}")
    for name in ("lr", "weight_decay", "scale", "eps"):
        if not 0 <= group[name] < math.inf:
            raise ValueError(f"GaLore's {name} is a number of at least 0, got {group[name]!r}")
    for name in ("beta1", "beta2"):
        if not 0 <= group[name] < 1:
            raise ValueError(f"GaLore's {name} is at least 0 and below 1, got {group[name]!r}")
    if group["bits"] not in (8, 32):
        raise ValueError(f"moments have 8 or 32 bits, not {group['bits']!r}")
    sides(1, 1, group["side"])
    for p in group["params"] if group["rank"] else ():
        if isinstance(p, Tensor) and p.dim() != 2:
            raise ValueError(
                f"GaLore projects matrices, and a group of rank {group['rank']} has a parameter of shape {tuple(p.shape)}; "
                "put it in a group without a rank, which is plain Adam"
            )


class GaLore(torch.optim.Optimizer):
    """GaLore, as `galore_step_` and `adam_step_` compute it. State: step, M and V, P and/or Q; tensors and a count.

    params: tensors or groups. A group may hold rank (0: no subspace), update_gap (steps between two refreshes), scale,
    side, niter (see `refreshed`), beta1, beta2, eps, lr, weight_decay, and bits: with 8, moments of at least 4096 elements
    are codes, with an M_absmax and V_absmax, and smaller ones float32, whether projected or not; with 32, M and V have the
    gradient's dtype, so of bfloat16 16 bits. They are kept as they are at a refresh.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0, eps: float = 1e-6) -> None:
        low = {"rank": 0, "update_gap": 200, "scale": 0.25, "side": "std", "niter": 0, "bits": 32}
        adam = {"lr": lr, "weight_decay": weight_decay, "beta1": 0.9, "beta2": 0.999, "eps": eps}
        super().__init__(params, low | adam)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; what is in another group already moves over.

        Raises ValueError for a knob out of its range, or a parameter that is no matrix in a group with a rank; then nothing
        is changed.
        """
        given = param_group["params"]
        param_group["params"] = [given] if isinstance(given, Tensor) else list(given)
        check_group(self.defaults | param_group)
        moving = {id(p) for p in param_group["params"]}
        groups, self.param_groups = self.param_groups, []  # torch refuses what is in another group
        try:
            super().add_param_group(param_group)
            for group in groups:
                group["params"] = [p for p in group["params"] if id(p) not in moving]
            groups += self.param_groups
        finally:
            self.param_groups = groups

    @torch.no_grad()
    def update(self, p: Tensor, G: Tensor, group: dict[str, Any]) -> None:
        """Take one step of one parameter, by its gradient G."""
        state, rank = self.state[p], group["rank"]
        taken = state.get("step", 0)
        if rank and taken % group["update_gap"] == 0:
            P, Q = refreshed(G, rank, group["side"], group["niter"], state.get("P"), state.get("Q"))
            state |= {name: t for name, t in (("P", P), ("Q", Q)) if t is not None}
        if "M" not in state:
            state |= _zero_moments(G, state.get("P"), state.get("Q"), group["bits"])
        state["step"] = taken + 1
        how = {name: group[name] for name in ("lr", "eps", "weight_decay")}
        how |= {"step": state["step"], "betas": (group["beta1"], group["beta2"])}
        absmax = {name: state.get(name) for name in ("M_absmax", "V_absmax")}
        if not rank:
            adam_step_(p, G, state["M"], state["V"], **absmax, **how)
            return
        galore_step_(
            p, G, state.get("P"), state.get("Q"), state["M"], state["V"], scale=group["scale"], **absmax, **how
        )

    def step(self, closure: Any = None) -> Any:
        """Take one step of every parameter that has a gradient; return the loss of `closure`, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; codes stay codes."""
        super().load_state_dict(state_dict)
        restore_dtypes(self, state_dict)


def _zero_moments(G: Tensor, P: Tensor | None, Q: Tensor | None, bits: int) -> dict[str, Tensor]:
    """Return M and V of the shape that P^T G Q has, or with 8 bits what `init_state` makes of it, under these names."""
    shape = list(G.shape)
    for side, basis in enumerate((P, Q)):
        if basis is not None:
            shape[side] = basis.shape[1]
    R = G.new_zeros(shape)
    if bits == 8:
        return {name[0].upper() + name[1:]: t for name, t in init_state(R).items()}
    return {"M": R, "V": torch.zeros_like(R)}
