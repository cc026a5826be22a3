"""AdamW with 8-bit moments (arXiv:2110.02861) as a torch optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.kernels.torch.adamw8bit_step import MIN_8BIT_SIZE, adamw8bit_step_, init_state, update, working_dtype


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with 8-bit moments for tensors of at least `min_8bit_size` elements. Smaller tensors have 32-bit moments.

    The state of a parameter holds `step` and the tensors that `init_state` returns.

    params: tensors or parameter groups. As in torch's AdamW, a group may set every option.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = MIN_8BIT_SIZE,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"min_8bit_size": min_8bit_size})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient.

        Return the loss that `closure` returns, or None without a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state |= {"step": 0, **init_state(p, group["min_8bit_size"])}
                state["step"] += 1
                if state["m"].dtype == torch.uint8:
                    moments = [state[name] for name in ("m", "m_absmax", "v", "v_absmax")]
                    adamw8bit_step_(p, p.grad, *moments, step=state["step"], **options)
                else:
                    dtype = working_dtype(p)
                    wide = [p.to(dtype), p.grad.to(dtype), state["m"], state["v"]]
                    p.copy_(update(*wide, step=state["step"], **options))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict`. 8-bit codes stay uint8, and 32-bit moments stay in 32 bits."""
        super().load_state_dict(state_dict)
        restore_dtypes(self, state_dict)


def restore_dtypes(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Give the state tensors of a loaded optimizer the dtypes that they have in `state_dict`.

    When torch loads a state, it casts each tensor to the dtype of the parameter.
    """
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for index, p in zip(saved, params, strict=True):
        for name, value in state_dict["state"].get(index, {}).items():
            if isinstance(value, Tensor):
                optimizer.state[p][name] = value.detach().to(p.device, copy=True)
