"""GaLore (arXiv:2403.03507): AdamW on the gradient in a subspace that is renewed every few steps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from plain_torch.blockwise import decode_dynamic, encode_dynamic
from plain_torch.layers import is_dense, wide
from plain_torch.targets import select
from plain_torch.whole_model import WholeModel

BLOCK, MIN_8BIT = 256, 4096


def sides(side: str, rows: int, columns: int) -> tuple[bool, bool]:
    """Tell whether a weight (rows, columns) is projected on the left, and whether on the right."""
    if side == "full":
        return True, True
    left = {
        "std": rows < columns, "reverse_std": rows >= columns, "paper": rows <= columns, "left": True, "right": False,
    }[side]  # fmt: skip
    return left, not left


def project(G: Tensor, P: Tensor | None, Q: Tensor | None) -> Tensor:
    """Return P^T G Q, where a missing matrix is the identity."""
    G = G if P is None else P.T @ G
    return G if Q is None else G @ Q


def project_back(N: Tensor, P: Tensor | None, Q: Tensor | None) -> Tensor:
    """Return P N Q^T, where a missing matrix is the identity."""
    N = N if P is None else P @ N
    return N if Q is None else N @ Q.T


def update(
    W: Tensor, G: Tensor, P: Tensor | None, Q: Tensor | None, M: Tensor, V: Tensor, *,
    step: int, lr: float, scale: float, betas: tuple[float, float], eps: float, weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return W, M and V after a step, all in at least float32."""
    dtype = wide(W.dtype)
    W, G, M, V = (tensor.to(dtype) for tensor in (W, G, M, V))
    P, Q = (None if basis is None else basis.to(dtype) for basis in (P, Q))
    R = project(G, P, Q)
    M = betas[0] * M + (1 - betas[0]) * R
    V = betas[1] * V + (1 - betas[1]) * R**2
    size = lr * scale * (1 - betas[1] ** step) ** 0.5 / (1 - betas[0] ** step)
    W = W - size * project_back(M / (V.sqrt() + eps), P, Q)
    return W * (1 - lr * weight_decay), M, V


@torch.no_grad()
def galore_step(
    W: Tensor, G: Tensor, P: Any, Q: Any, M: Tensor, V: Tensor, side: str, **how: Any
) -> tuple[Tensor, ...]:
    """Return W, M and V after a step with given projections."""
    return tuple(new.to(old.dtype) for new, old in zip(update(W, G, P, Q, M, V, **how), (W, M, V), strict=True))


@torch.no_grad()
def galore8bit_step(
    W: Tensor,
    G: Tensor,
    P: Any,
    Q: Any,
    M: Tensor,
    V: Tensor,
    M_absmax: Tensor,
    V_absmax: Tensor,
    side: str,
    **how: Any,
) -> tuple[Tensor, ...]:
    """Return W and the 8-bit moments after a step with given projections."""
    shape = project(G, P, Q).shape
    moments = (decode_dynamic(M, M_absmax, True, BLOCK), decode_dynamic(V, V_absmax, False, BLOCK))
    new, m, v = update(W, G, P, Q, *(moment.reshape(shape) for moment in moments), **how)
    return new.to(W.dtype), *encode_dynamic(m.flatten(), True, BLOCK), *encode_dynamic(v.flatten(), False, BLOCK)


def singular_vectors(G: Tensor, rank: int, niter: int, previous: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
    """Return the first singular vectors of G on both sides, in float64. `previous` holds the last bases, left and right."""
    G = G.double()
    if not niter:
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        return U[:, :rank], Vh[:rank].T
    upright = G.shape[0] >= G.shape[1]
    tall = G if upright else G.T
    longer, shorter = previous if upright else previous[::-1]
    columns = min(rank + 10, tall.shape[1])
    sketch = torch.randn(tall.shape[1], columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sketch = sketch.to(G.device)
    if shorter is not None:
        sketch[:, :rank] = shorter.double()
    elif longer is not None:
        sketch[:, :rank] = tall.T @ longer.double()
    basis = torch.linalg.qr(tall @ sketch).Q
    for _ in range(niter):
        basis = torch.linalg.qr(tall @ torch.linalg.qr(tall.T @ basis).Q).Q
    U, _, Vh = torch.linalg.svd(basis.T @ tall, full_matrices=False)
    U, V = (basis @ U)[:, :rank], Vh[:rank].T
    return (U, V) if upright else (V, U)


class GaLore(torch.optim.Optimizer):
    """AdamW whose groups with `projected` move in a subspace. All other groups get plain Adam."""

    def __init__(self, groups: list[dict[str, Any]], config: Any, lr: float, weight_decay: float, bits: int) -> None:
        self.config, self.bits = config, bits
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "projected": False})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, whose tensors keep their dtypes."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.detach().clone().to(p.device)

    def bases(self, p: Tensor, state: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Return the projections of a step: those of the state, or new ones if they are due."""
        if (step - 1) % self.config.update_gap:
            return {name: state[name] for name in ("P", "Q") if name in state}
        rank = min(self.config.rank, *p.shape)
        vectors = singular_vectors(p.grad, rank, self.config.niter, (state.get("P"), state.get("Q")))
        used = zip("PQ", vectors, sides(self.config.side, *p.shape), strict=True)
        return {name: basis.to(p.grad.dtype, copy=True).contiguous() for name, basis, uses in used if uses}

    def moments(self, state: dict[str, Any], R: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Return M and V in the shape of the projected gradient."""
        if "M" not in state:
            return [torch.zeros(R.shape, dtype=dtype, device=R.device) for _ in "MV"]
        if "M_absmax" not in state:
            return [state["M"], state["V"]]
        return [decode_dynamic(state[x], state[f"{x}_absmax"], x == "M", BLOCK).reshape(R.shape) for x in "MV"]

    def stepped(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return the value and the state of a parameter after a step."""
        config, state = self.config, self.state.get(p, {})
        step = state.get("step", 0) + 1
        new: dict[str, Any] = self.bases(p, state, step) if group["projected"] else {}
        P, Q = new.get("P"), new.get("Q")
        M, V = self.moments(state, project(p.grad, P, Q), wide(p.dtype))
        W, M, V = update(
            p, p.grad, P, Q, M, V, step=step, lr=group["lr"], scale=config.scale if group["projected"] else 1.0,
            betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=group["weight_decay"],
        )  # fmt: skip
        new["step"] = step
        for name, moment in (("M", M), ("V", V)):
            if self.bits == 8 and moment.numel() >= MIN_8BIT:
                new[name], new[f"{name}_absmax"] = encode_dynamic(moment.flatten(), name == "M", BLOCK)
            else:
                new[name] = moment.contiguous()
        return W, new

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step. If a gradient is refused, no parameter changes."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [
            (p, *self.stepped(p, group)) for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        for p, value, state in moved:
            p.copy_(value)
            self.state[p] = state
        return loss


class GaLoreModel(WholeModel):
    """A model whose targets train in subspaces."""

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module], names: list[str], config: Any) -> None:
        super().__init__(model, layers, names)
        self.config = config

    def optimizer(self, lr: float, weight_decay: float, bits: int = 32) -> torch.optim.Optimizer:
        """Return a GaLore optimizer with moments of 32 or 8 bits."""
        projected = {id(self.model.get_parameter(f"{path}.weight")) for path in self.layers}
        groups = [
            {"params": [p for p in self.parameters() if (id(p) in projected) == wanted], "projected": wanted}
            for wanted in (True, False)
        ]
        return GaLore([group for group in groups if group["params"]], self.config, lr, weight_decay, bits)


def attach(model: nn.Module, config: Any, generator: Any) -> GaLoreModel:
    """Make the weights of the targets trainable, and perhaps every other parameter."""
    layers = select(model, config.targets, ("linear",))
    if not all(is_dense(layer) for layer in layers.values()):
        raise ValueError("a packed weight gets no gradient")
    everything = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    names = everything if config.train_rest else [name for name in everything if name.removesuffix(".weight") in layers]
    return GaLoreModel(model, layers, names, config)
