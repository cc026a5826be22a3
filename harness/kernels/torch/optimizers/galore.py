"""GaLore as an optimizer (arXiv:2403.03507): AdamW in a subspace for groups with a rank, plain AdamW for others."""

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
    """Raise ValueError for an option of a group that is out of range, and for a projected parameter that is no matrix."""
    for name, least in (("rank", 0), ("update_gap", 1), ("niter", 0)):
        if not isinstance(group[name], Integral) or group[name] < least:
            raise ValueError(f"GaLore: {name} must be an integer of at least {least}, got {group[name]!r}")
    for name in ("lr", "weight_decay", "scale", "eps"):
        if not 0 <= group[name] < math.inf:
            raise ValueError(f"GaLore: {name} must be finite and at least 0, got {group[name]!r}")
    for name in ("beta1", "beta2"):
        if not 0 <= group[name] < 1:
            raise ValueError(f"GaLore: {name} must be at least 0 and below 1, got {group[name]!r}")
    if group["bits"] not in (8, 32):
        raise ValueError(f"GaLore: bits must be 8 or 32, got {group['bits']!r}")
    sides(1, 1, group["side"])
    for p in group["params"] if group["rank"] else ():
        if isinstance(p, Tensor) and p.dim() != 2:
            raise ValueError(
                f"GaLore projects matrices, but a group of rank {group['rank']} has a parameter of shape {tuple(p.shape)}; "
                "hint: put it in a group of rank 0, which is plain Adam"
            )


class GaLore(torch.optim.Optimizer):
    """GaLore by `galore_step_` and `adam_step_`. State per parameter: step, M and V, P and/or Q.

    params: tensors or groups. Options of a group: rank (0: no subspace), update_gap (steps between two refreshes), scale,
    side and niter (see `refreshed`), beta1, beta2, eps, lr, weight_decay, bits. With 8 bits, moments of at least 4096
    elements are codes with M_absmax and V_absmax, smaller ones float32, projected or not; with 32, M and V have the
    gradient's dtype, so 16 bits for bfloat16. A refresh does not change the moments.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0, eps: float = 1e-6) -> None:
        low = {"rank": 0, "update_gap": 200, "scale": 0.25, "side": "std", "niter": 0, "bits": 32}
        adam = {"lr": lr, "weight_decay": weight_decay, "beta1": 0.9, "beta2": 0.999, "eps": eps}
        super().__init__(params, low | adam)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; parameters of other groups move to it.

        Raises ValueError as `check_group` does, and then changes nothing.
        """
        params = param_group["params"]
        param_group["params"] = [params] if isinstance(params, Tensor) else list(params)
        check_group(self.defaults | param_group)
        moving = {id(p) for p in param_group["params"]}
        groups, self.param_groups = self.param_groups, []  # torch rejects parameters of another group
        try:
            super().add_param_group(param_group)
            for group in groups:
                group["params"] = [p for p in group["params"] if id(p) not in moving]
            groups += self.param_groups
        finally:
            self.param_groups = groups

    @torch.no_grad()
    def update(self, p: Tensor, G: Tensor, group: dict[str, Any]) -> None:
        """Take one step of parameter p with its gradient G."""
        state, rank = self.state[p], group["rank"]
        steps = state.get("step", 0)
        if rank and steps % group["update_gap"] == 0:
            P, Q = refreshed(G, rank, group["side"], group["niter"], state.get("P"), state.get("Q"))
            state |= {name: t for name, t in (("P", P), ("Q", Q)) if t is not None}
        if "M" not in state:
            state |= _zero_moments(G, state.get("P"), state.get("Q"), group["bits"])
        state["step"] = steps + 1
        options = {name: group[name] for name in ("lr", "eps", "weight_decay")}
        options |= {"step": state["step"], "betas": (group["beta1"], group["beta2"])}
        absmax = {name: state.get(name) for name in ("M_absmax", "V_absmax")}
        if not rank:
            adam_step_(p, G, state["M"], state["V"], **absmax, **options)
            return
        galore_step_(
            p, G, state.get("P"), state.get("Q"), state["M"], state["V"], scale=group["scale"], **absmax, **options
        )

    def step(self, closure: Any = None) -> Any:
        """Step every parameter that has a gradient; return the loss of `closure`, if given."""
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
        """Load a `state_dict`; codes stay uint8."""
        super().load_state_dict(state_dict)
        restore_dtypes(self, state_dict)


def _zero_moments(G: Tensor, P: Tensor | None, Q: Tensor | None, bits: int) -> dict[str, Tensor]:
    """Return zero moments M and V of the shape of P^T G Q; with 8 bits the state of `init_state` under these names."""
    shape = list(G.shape)
    for side, basis in enumerate((P, Q)):
        if basis is not None:
            shape[side] = basis.shape[1]
    R = G.new_zeros(shape)
    if bits == 8:
        return {name[0].upper() + name[1:]: t for name, t in init_state(R).items()}
    return {"M": R, "V": torch.zeros_like(R)}
