"""GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection. Zhao et al., ICML 2024, arXiv:2403.03507.

    R_t = P_t^T G_t Q_t                        the gradient in a subspace             (definition 3.6, eq. 10)
    N_t = Adam(R_t)                            with moments of R's small shape                   (algorithm 2)
    W_t = W_{t-1} - lr alpha P_t N_t Q_t^T     algorithm 2 has a plus, because its G is the negative gradient

By default, only P (m, r) or Q (n, r) is used, and the other is the identity. The matrix in use holds the first singular
vectors of a gradient, and is recomputed every T steps. There is no adapter, because the weights W themselves train.
Shape letters: W and G are (m, n).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from reference.shared import galore_moments
from reference.shared.adapted import AdaptedModel
from reference.shared.layers import targets
from reference.shared.optimizers import loss_of, restore_dtypes
from reference.shared.randomised_svd import randomised_svd
from reference.spec import Deviation, ReferenceSpec

SPEC = ReferenceSpec(
    paper="arXiv:2403.03507v2",
    optimizer="GaLore",
    optimizers=("adamw", "adamw-8bit"),
    trains_weights=True,
    deviations=(
        Deviation(
            topic="side of a square matrix",
            paper="projects on the left if m <= n, and so a square matrix too",
            here="side `std` is the authors' code, which projects on the right if m >= n, and so a square matrix "
            "too; side `paper` is the paper's rule",
            why="galore-torch and the Hugging Face Trainer use std; both rules agree on all other shapes",
        ),
        Deviation(
            topic="moments at a refresh",
            paper="section 4.1 states only that a change of subspace may impact their fidelity",
            here="unchanged: neither reset nor rotated into the new basis",
            why="the authors' code does the same",
        ),
        Deviation(
            topic="eps",
            paper="algorithm 2 adds it to sqrt(V / (1 - beta2^t))",
            here="added to sqrt(V), with the bias corrections in the step size; this equals eps / sqrt(1 - beta2^t) "
            "in the paper's form",
            why="the authors' code does the same, like the AdamW of old releases of transformers; its default is 1e-6 "
            "instead of Adam's 1e-8",
        ),
        Deviation(
            topic="bias correction",
            paper="algorithm 2 counts t from 0 and overwrites M_t and V_t with the corrected moments",
            here="t counts from 1, and the stored moments are uncorrected",
            why="the printed form divides by zero at t = 0 and corrects twice later; Adam and the authors' code do "
            "the same as here",
        ),
        Deviation(
            topic="weight decay",
            paper="none",
            here="decoupled: W is multiplied by 1 - lr * weight_decay after the update, with the full lr, not scaled "
            "by alpha",
            why="the authors' code does the same; torch's AdamW decays before the update",
        ),
        Deviation(
            topic="shape of the moments",
            paper="algorithm 2 prints n x r for a left projection",
            here="shape and dtype of R: r x n on the left, m x r on the right; in 16 bits, they may be float32 instead",
            why="R = P^T G is r x n",
        ),
        Deviation(
            topic="precision of the singular vectors",
            paper="not stated",
            here="computed in at least float32 and rounded to the gradient's dtype; float64 stays float64",
            why="the authors' code computes the vectors of a float64 gradient in float32",
        ),
        Deviation(
            topic="8-bit moments",
            paper="section 4.3 combines it with 8-bit Adam, without details",
            here="`bits: 8`: moments of at least 4096 elements (R's shape) are codes as in reference/operations/adamw8bit, "
            "smaller ones float32, also for weights without a projection; the step is the 32-bit one, with eps and decay as "
            "above; projectors have the gradient's dtype",
            why="the authors' GaLoreAdamW8bit uses bitsandbytes' step, which adds eps as algorithm 2 does: sqrt(V / "
            "(1 - beta2^t)) + eps",
        ),
        Deviation(
            topic="randomised SVD",
            paper="an exact SVD; its sequel, GaLore 2 (arXiv:2504.20437), uses a randomised one",
            here="exact by default. niter > 0: Q = qr(G S), then niter times qr(G^T Q) and qr(G Q); G^T for G if m < n. For "
            "every side, S is a float64 torch.randn of shape (min(m, n), min(r + 10, m, n)), seed 0; later, the previous "
            "basis replaces its first r columns. A basis of the longer side alone is first multiplied by G^T, or G if m < n",
            why="the exact SVD of a large layer is slow; with the same vectors, a resumed run continues exactly",
        ),
        Deviation(
            topic="refresh with per-layer updates",
            paper="every T steps",
            here="every T steps",
            why="the authors' training script passes 2 T there",
        ),
    ),
)
OVERSAMPLE = 10
"""Number of columns that the sketch of the randomised SVD has in addition to the rank."""


@dataclass(frozen=True)
class Config:
    """Hyperparameters of GaLore."""

    rank: int = field(default=128, metadata={"minimum": 1, "maximum": 65536})
    """Rank r of the projection; for a weight (m, n), it is at most min(m, n)."""
    update_gap: int = field(default=200, metadata={"minimum": 1, "maximum": 1000000})
    """T: a projector is computed at steps 1, T + 1, 2 T + 1 and so on. A tensor counts only its steps with a gradient."""
    scale: float = field(default=0.25, metadata={"minimum": 1e-6, "maximum": 1e6})
    """alpha, the factor on the learning rate of projected weights."""
    side: str = field(default="std", metadata={"choices": ("std", "reverse_std", "paper", "left", "right", "full")})
    """Projected side of an (m, n) weight. `std`, the authors' default: right if m >= n, else left. `reverse_std`: left if
    m >= n, else right. `paper`: left if m <= n, else right. `left`, `right`: always this side. `full`: both sides."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Layers with projected gradients: ends of module paths, whole paths, `attention` or `all-linear`."""
    train_rest: bool = True
    """True to train every other parameter too, with plain Adam."""
    beta1: float = field(default=0.9, metadata={"minimum": 0.0, "maximum": 0.9999999})
    """Adam's decay of the first moment."""
    beta2: float = field(default=0.999, metadata={"minimum": 0.0, "maximum": 0.9999999})
    """Adam's decay of the second moment."""
    eps: float = field(default=1e-6, metadata={"minimum": 0.0, "maximum": 1.0})
    """Adam's eps, added to sqrt(V)."""
    niter: int = field(default=0, metadata={"minimum": 0, "maximum": 100})
    """Subspace iterations of the randomised SVD; 0 for the exact SVD."""


@dataclass(frozen=True)
class Projector:
    """Two orthonormal bases of the subspace, P for the left side and Q for the right. None stands for the identity."""

    P: Tensor | None = None
    """Left basis (m, r), or None."""
    Q: Tensor | None = None
    """Right basis (n, r), or None."""


def sides(m: int, n: int, side: str) -> tuple[bool, bool]:
    """Return two booleans: whether `side` projects an (m, n) matrix on the left, and whether it does so on the right.

    Raises ValueError if `side` is unknown."""
    rules = {
        "std": (m < n, m >= n),
        "reverse_std": (m >= n, m < n),
        "paper": (m <= n, m > n),
        "left": (True, False),
        "right": (False, True),
        "full": (True, True),
    }
    if side not in rules:
        raise ValueError(f"unknown side {side!r}; known: {', '.join(rules)}")
    return rules[side]


def projector(G: Tensor, rank: int, side: str = "std", niter: int = 0, old: Projector | None = None) -> Projector:
    """Return the first `rank` singular vectors of G on the sides that `side` selects, in G's dtype.

    With G = U S V^T, these are P = U[:, :r] and Q = V[:, :r] (eqs. 12 and 13). The signs of singular vectors are
    arbitrary, but they cancel in the update, where P and Q occur twice. niter: number of subspace iterations of a
    randomised SVD that starts from `old`; 0 for the exact SVD. Raises ValueError if G is not finite.
    """
    if not G.isfinite().all():
        raise ValueError(
            f"GaLore: the gradient of a parameter of shape {tuple(G.shape)} contains NaN or infinity and has no singular "
            "vectors; hint: skip the step, or lower the learning rate or the loss scale"
        )
    wide = G.to(torch.promote_types(G.dtype, torch.float32))
    if niter:
        U, _, Vh = randomised_svd(wide, sketch(wide, rank, old or Projector()), niter)
    else:
        U, _, Vh = torch.linalg.svd(wide, full_matrices=False)
    left, right = sides(G.shape[0], G.shape[1], side)
    return Projector(
        # Views would keep all singular vectors in memory, so these are copies.
        U[:, :rank].to(G.dtype, copy=True) if left else None,
        Vh[:rank].T.to(G.dtype, copy=True) if right else None,
    )


def sketch(G: Tensor, rank: int, old: Projector) -> Tensor:
    """Return the start of a randomised SVD of G: the columns of the basis `old`, then random ones from a fixed seed.

    Its shape is (min(m, n), K), where K is rank + OVERSAMPLE, but at most min(m, n).
    """
    tall = G if G.shape[0] >= G.shape[1] else G.T
    smaller, larger = (old.Q, old.P) if tall is G else (old.P, old.Q)
    if smaller is None:
        smaller = tall.T @ larger.to(G) if larger is not None else G.new_empty(tall.shape[1], 0)
    columns = min(rank + OVERSAMPLE, tall.shape[1])
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(tall.shape[1], columns, generator=generator, dtype=torch.float64, device="cpu")
    return torch.cat([smaller.to(G), random[:, smaller.shape[1] :].to(G)], dim=1)


def project(G: Tensor, basis: Projector) -> Tensor:
    """Return R = P^T G Q. Its shape is (r, n) if only P is used, (m, r) if only Q is used, and (r, r) with both."""
    R = G if basis.P is None else basis.P.T @ G
    return R if basis.Q is None else R @ basis.Q


def project_back(N: Tensor, basis: Projector) -> Tensor:
    """Return P N Q^T, of shape (m, n). The factor alpha is not included."""
    full = N if basis.P is None else basis.P @ N
    return full if basis.Q is None else full @ basis.Q.T


def adam(R: Tensor, state: dict[str, Any], beta1: float, beta2: float, eps: float, bits: int = 32) -> Tensor:
    """Return Adam's step N_t in R's dtype. Update the moments and the step number t (from 1) in `state`.

        M_t = beta1 M_{t-1} + (1 - beta1) R_t          V_t = beta2 V_{t-1} + (1 - beta2) R_t^2           (algorithm 2)
        N_t = sqrt(1 - beta2^t) / (1 - beta1^t) * M_t / (sqrt(V_t) + eps)

    bits: 8 or 32, the bits of the moments of a new state. N_t is computed before the moments are quantised.
    """
    if "M" not in state:
        state |= {"step": 0, **galore_moments.zeros(R, bits)}
    M, V = galore_moments.decode(state, R)
    wide = R.to(M.dtype)
    state["step"] += 1
    M.mul_(beta1).add_(wide, alpha=1 - beta1)
    V.mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
    correction = math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
    N: Tensor = correction * (M / (V.sqrt() + eps))
    galore_moments.encode(state, M, V)
    return N.to(R.dtype)


@torch.no_grad()
def galore_step(
    W: Tensor,
    G: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    rank: int,
    update_gap: int = 200,
    scale: float = 0.25,
    side: str = "std",
    weight_decay: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-6,
    niter: int = 0,
    bits: int = 32,
    given: Projector | None = None,
) -> None:
    """Take one step of W (m, n) with the gradient G (m, n). W and `state` change in place.

    state: empty before the first step. After it, `state` holds the number of steps, the moments M and V
    (`galore_moments.zeros`) and, with a projection, P, Q or both. rank: 0 means plain Adam, without a projection, for any
    shape. Otherwise, the first step, and then every update_gap-th step, computes a new projector. given: a projector to
    use instead of computing one, so that two programs can be compared in one subspace.
    """
    if rank and state.get("step", 0) % update_gap == 0:
        fresh = given or projector(G, rank, side, niter, Projector(state.get("P"), state.get("Q")))
        state |= {name: t for name, t in (("P", fresh.P), ("Q", fresh.Q)) if t is not None}
    basis = Projector(state.get("P"), state.get("Q"))
    N = adam(project(G, basis), state, beta1, beta2, eps, bits)
    W.sub_(project_back(N, basis), alpha=lr * (scale if rank else 1.0))
    if weight_decay:
        W.mul_(1 - lr * weight_decay)


def state_elements(m: int, n: int, rank: int, side: str = "std") -> int:
    """Return the number of elements in the state of an (m, n) weight. The state has a projector and two moments.

    With a left projector of rank r, this is mr + 2nr (table 1).
    """
    r = min(rank, m, n)
    left, right = sides(m, n, side)
    return r * (m * left + n * right) + 2 * (r if left else m) * (r if right else n)


def check_group(group: dict[str, Any]) -> None:
    """Raise ValueError if a parameter group has an invalid option, or a parameter that cannot be projected.

    If the group's `rank` is above 0, its parameters are projected, and must be matrices.
    """
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
    """An optimizer: Adam in a subspace for parameter groups with a `rank` above 0, and plain Adam for other groups.

    The state of a parameter holds only tensors and the number of steps. Options of a group: rank, update_gap, scale,
    side, niter, lr, weight_decay, beta1, beta2, eps, bits. With bits=8, moments of at least 4096 elements are stored as
    8-bit codes. Smaller moments are float32, or float64 for float64 gradients.
    """

    options = ("lr", "weight_decay", "rank", "update_gap", "scale", "side", "niter", "bits", "beta1", "beta2", "eps")

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0, eps: float = 1e-6) -> None:
        low = {"rank": 0, "update_gap": 200, "scale": 0.25, "side": "std", "niter": 0, "bits": 32}
        adam = {"lr": lr, "weight_decay": weight_decay, "beta1": 0.9, "beta2": 0.999, "eps": eps}
        super().__init__(params, low | adam)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. A parameter that is in another group moves to the new one.

        Raises ValueError, and changes nothing, if an option is out of range, or if the group has a rank above 0 and a
        parameter that is not a matrix.
        """
        given = param_group["params"]
        param_group["params"] = [given] if isinstance(given, Tensor) else list(given)
        check_group(self.defaults | param_group)
        moving = {id(p) for p in param_group["params"]}
        groups, self.param_groups = self.param_groups, []  # torch refuses a parameter that another group has
        try:
            super().add_param_group(param_group)
            for group in groups:
                group["params"] = [p for p in group["params"] if id(p) not in moving]
            groups += self.param_groups
        finally:
            self.param_groups = groups

    def update(self, p: Tensor, G: Tensor, group: dict[str, Any]) -> None:
        """Take one step of one parameter with its gradient G."""
        options = {name: group[name] for name in self.options}  # programs and schedulers add other keys to a group
        galore_step(p, G, self.state[p], **options)

    def step(self, closure: Any = None) -> Any:
        """Take one step of every parameter that has a gradient. Return the loss of `closure`, or None without a closure."""
        loss = loss_of(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a result of the method `state_dict`. 8-bit codes keep their dtype."""
        super().load_state_dict(state_dict)
        restore_dtypes(self, state_dict)


class GaLoreModel(AdaptedModel):
    """A model whose weights train by GaLore."""

    layers: dict[str, nn.Linear]
    """Layers whose gradients are projected, by path."""

    def __init__(self, model: nn.Module, layers: dict[str, nn.Linear], config: Config) -> None:
        super().__init__(model, layers)
        self.config = config

    def optimizer(self, lr: float, weight_decay: float, bits: int = 32) -> GaLore:
        """Return a GaLore optimizer. It projects the gradients of the targets' weights. Other parameters get plain Adam.

        Plain Adam has no alpha, but the same eps and weight decay. bits: 8 or 32, the bits of the moments.
        """
        c = self.config
        betas = {"beta1": c.beta1, "beta2": c.beta2, "bits": bits}
        low = {"rank": c.rank, "update_gap": c.update_gap, "scale": c.scale, "side": c.side, "niter": c.niter}
        projected = list({id(layer.weight): layer.weight for layer in self.layers.values()}.values())
        rest = [p for p in self.parameters() if not any(p is one for one in projected)]
        groups = [{"params": projected, **low, **betas}] + ([{"params": rest, **betas}] if rest else [])
        return GaLore(groups, lr, weight_decay, c.eps)


def attach(model: nn.Module, config: Config, generator: torch.Generator) -> GaLoreModel:
    """Make the weights of the targets trainable and, with `train_rest`, every other parameter. `generator` is not used.

    `tensors()` lists all that train, by their names in the model. Raises ValueError if a target names no linear layer, or
    one with a packed 4-bit weight, which gets no gradient.
    """
    layers = targets(model, config.targets)
    for path, layer in layers.items():
        if not layer.weight.is_floating_point():
            raise ValueError(f"{path}: GaLore trains the weight itself, but it is packed ({layer.weight.dtype})")
    model.requires_grad_(config.train_rest)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    return GaLoreModel(model, layers, config)
