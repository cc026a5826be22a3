"""Layer-wise weight updates: during the backward pass, each gradient updates its weight, and is then freed.

LOMO (Lv et al., arXiv:2306.09782) introduced this method, and GaLore's per-layer weight updates (arXiv:2403.03507,
section 4.3) use it. The gradients never exist all at once, so that they take only the memory of the largest one. The
results equal those of a usual step bit for bit: once the gradient of a weight is complete, the rest of the pass does
not read the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def _gradient(p: Tensor) -> Tensor | None:
    return p.grad


class Layerwise:
    """Hooks that update each parameter as soon as its gradient is complete. A later `optimizer.step()` then does nothing.

    optimizer: must update each parameter independently, and skip parameters without a gradient. When this object is
    made, no parameter may have a gradient. gradient: function that takes a parameter and returns the gradient that
    `norm` includes, or None to skip the update of the parameter. Clipping by the global norm, loss scaling with
    retries, and accumulation over several backward passes are not possible.
    """

    most_B: int
    """Bytes of the largest gradient so far. If `gradient` returned another tensor, the bytes of that tensor are included."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, gradient: Callable[[Tensor], Tensor | None] = _gradient
    ) -> None:
        self.optimizer, self.gradient, self.most_B = optimizer, gradient, 0
        self._norms: dict[Tensor, Tensor] = {}
        trains = [p for group in optimizer.param_groups for p in group["params"]]
        self._hooks = [p.register_post_accumulate_grad_hook(self._update) for p in trains]

    def norm(self, of: Iterable[Tensor]) -> float:
        """Return the joint 2-norm of the gradients that have updated the parameters in `of` since the last call.

        If there were no gradients, return 0.
        """
        norms = [norm for p in of if (norm := self._norms.get(p)) is not None]
        self._norms.clear()
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0

    def remove(self) -> None:
        """Remove the hooks from the parameters."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _update(self, p: Tensor) -> None:
        if p.grad is not None and (gradient := self.gradient(p)) is not None:
            self.most_B = max(self.most_B, p.grad.nbytes + (gradient.nbytes if gradient is not p.grad else 0))
            self._norms[p] = torch.linalg.vector_norm(gradient)
            del gradient
            self.optimizer.step()  # no other parameter has a gradient now
            p.grad = None
