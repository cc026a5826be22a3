"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning. Zhang et al., ICLR 2023, arXiv:2303.10512.

    h = W0 x + s P Lambda Q x                                       (eq. 3), Lambda diagonal and zero at the start
    loss + gamma R(P, Q),  R = ||P^T P - I||^2 + ||Q Q^T - I||^2    (eq. 4), so that P and Q stay near orthogonal
    every delta_t steps only the b(t) most important triplets of the whole model keep their lambda   (eqs. 6 to 12)

Tensors have the names of the authors' code and of HF peft, not the paper's letters: A (R, D) is Q, E (R, 1) is the
diagonal of Lambda, and B (E, R) is P. Triplet i consists of column i of P, lambda i and row i of Q. Shape letters: T
tokens, D input features, E output features, R initial rank of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from reference.shared.adapted import AdaptedLayer, AdaptedLayers
from reference.shared.layers import (
    CONVOLUTIONS,
    LINEAR_OR_CONV1D,
    Convolution,
    device_of,
    features_in_out,
    floating_dtype,
    kind_of,
    replace,
    targets,
)
from reference.shared.lora_layers import convolve
from reference.spec import Deviation, ReferenceSpec

SPEC = ReferenceSpec(
    paper="arXiv:2303.10512v2",
    factors=("A", "B"),
    opt_in_layers=("Conv2d",),
    deviations=(
        Deviation(
            topic="names of the tensors",
            paper="P, Lambda, Q",
            here="B, E, A",
            why="the authors' code, HF peft and saved adapters use these names (lora_B, lora_E, lora_A)",
        ),
        Deviation(
            topic="scaling",
            paper="none in eq. 3; section 4 adds LoRA's, alpha / r",
            here="alpha / (rank + 1e-5), always with the initial rank",
            why="the authors' code and HF peft do the same; the 1e-5 guards against a division by zero and is "
            "visible in float64",
        ),
        Deviation(
            topic="orthogonality term",
            paper="sum over all matrices of the squared Frobenius norm (eq. 4)",
            here="`mean-norm` (default), the mean of the norms of the 2n matrices; `squared-sum` is eq. 4",
            why="the authors' code and HF peft compute the mean of norms; their gamma does not fit the paper's form",
        ),
        Deviation(
            topic="time of scoring",
            paper="before the update: algorithm 1 uses w_t and its gradient",
            here="after the update: w_(t+1) times the gradient at w_t",
            why="the authors' trainer and HF peft's documentation call the allocator after optimizer.step",
        ),
        Deviation(
            topic="number of the step",
            paper="t = 1 .. T",
            here="counted from 1, as in the paper",
            why="the authors' trainer passes 0 at its first update; call after_step(step - 1) to reproduce it",
        ),
        Deviation(
            topic="denominator of the budget",
            paper="eq. 12 (appendix A) prints t - t_i - t_f over T - t_i - t_f",
            here="t - t_i over T - t_i - t_f",
            why="the printed form starts above the initial budget; the authors' code and HF peft use the form here",
        ),
        Deviation(
            topic="budget as a whole number",
            paper="real-valued",
            here="rounded down, in integers",
            why="the authors' code and HF peft round down in floating point, with the same result at usual sizes",
        ),
        Deviation(
            topic="equal scores",
            paper="the top b(t) triplets stay",
            here="exactly b(t) triplets stay; of equal scores the first in the model's order of layers, then by index",
            why="the authors' code and HF peft zero all scores up to the k-th smallest (torch.kthvalue), ties "
            "included, so that fewer than b(t) triplets stay",
        ),
        Deviation(
            topic="target rank equal to the initial rank",
            paper="not considered",
            here="nothing is pruned; a target above the initial rank raises ValueError",
            why="the authors' code and HF peft call torch.kthvalue for the 0th value and fail at the first pruning",
        ),
        Deviation(
            topic="final phase",
            paper="the budget is the target from T - t_f on; pruned every delta_t steps",
            here="at step T - t_f the mask gets the target budget and scoring stops; each later step applies this mask",
            why="HF peft does the same; the authors' code forces the target one step later, and never if t_f = 0 and "
            "delta_t does not divide T",
        ),
        Deviation(
            topic="convolutions",
            paper="not treated",
            here="P Lambda Q is the change of the kernel as a matrix, with one row per output channel; stride, padding, "
            "padding mode, dilation and groups are those of the layer",
            why="HF peft does the same for a Conv2d, without the padding mode; with groups its forward pass raises",
        ),
        Deviation(
            topic="precision of the scores",
            paper="not stated",
            here="at least float32",
            why="a score multiplies four small numbers and would be zero in float16; the authors and HF peft train "
            "these tensors in float32",
        ),
    ),
)

KINDS = (*LINEAR_OR_CONV1D, "Conv2d")
"""Kinds of layers that AdaLoRA adapts."""
_EPS = 1e-5
"""Number that is added to the rank in the scaling alpha / rank, as in the authors' code."""
_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")
"""Prefixes of names in `state()`, as in the authors' code: `exp_avg_ipt` for the average sensitivity I_bar, and
`exp_avg_unc` for the average uncertainty U_bar."""
_STD = 0.02
"""Standard deviation of the initial A and B, as in the authors' code and HF peft."""


@dataclass(frozen=True)
class Config:
    """Hyperparameters of AdaLoRA."""

    rank: int = field(default=12, metadata={"minimum": 1, "maximum": 4096})
    """Initial rank R of every layer."""
    target_rank: int = field(default=8, metadata={"minimum": 1, "maximum": 4096})
    """Mean rank per layer at the end of training."""
    alpha: float = field(default=16.0, metadata={"minimum": 1e-3, "maximum": 1e4})
    """Numerator of the scaling alpha / R, where R is the initial rank."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Layers to adapt: ends of module paths, whole paths, `attention` or `all-linear`."""
    dropout: float = field(default=0.0, metadata={"minimum": 0.0, "maximum": 0.99})
    """Probability that an input feature of the adapter branch is dropped in training."""
    total_steps: int = field(default=1000, metadata={"minimum": 1})
    """Number of optimizer steps in the whole training (T in the paper). A run that ends before step total_steps - tfinal
    does not reach the target rank."""
    tinit: int = field(default=100, metadata={"minimum": 0})
    """Number of steps before pruning begins (t_i)."""
    tfinal: int = field(default=200, metadata={"minimum": 0})
    """Number of steps at the end with a fixed mask (t_f)."""
    delta_t: int = field(default=10, metadata={"minimum": 1})
    """Number of steps from one pruning to the next."""
    beta1: float = field(default=0.85, metadata={"minimum": 0.0, "maximum": 1.0})
    """Decay of the average sensitivity (eq. 9)."""
    beta2: float = field(default=0.85, metadata={"minimum": 0.0, "maximum": 1.0})
    """Decay of the average uncertainty (eq. 10)."""
    orthogonality: float = field(default=0.5, metadata={"minimum": 0.0})
    """gamma, weight of the regulariser R(P, Q) (eq. 4)."""
    regularization: str = field(default="mean-norm", metadata={"choices": ("mean-norm", "squared-sum")})
    """Formula of the regulariser R(P, Q). `squared-sum` is eq. 4; `mean-norm` is the mean of the norms without squares."""


def sensitivity(w: Tensor, grad: Tensor) -> Tensor:
    """Return I = |w dL/dw| (eq. 8), elementwise."""
    return (w * grad).abs()


def smoothed(I_bar: Tensor, I: Tensor, beta1: float) -> Tensor:  # noqa: E741  # the paper's letter
    """Return the next average sensitivity, I_bar <- beta1 I_bar + (1 - beta1) I (eq. 9)."""
    return beta1 * I_bar + (1 - beta1) * I


def uncertainty(U_bar: Tensor, I: Tensor, I_bar: Tensor, beta2: float) -> Tensor:  # noqa: E741
    """Return the next average uncertainty, U_bar <- beta2 U_bar + (1 - beta2) |I - I_bar| (eq. 10).

    I_bar: the average sensitivity, already updated with I (eq. 9).
    """
    return beta2 * U_bar + (1 - beta2) * (I - I_bar).abs()


def importance(I_bar: Tensor, U_bar: Tensor) -> Tensor:
    """Return s = I_bar U_bar (eq. 11), elementwise."""
    return I_bar * U_bar


def triplet_scores(s_A: Tensor, s_E: Tensor, s_B: Tensor) -> Tensor:
    """Return S (R,), the score of each triplet (eq. 7).

    The score of triplet i is the importance of lambda i, plus the mean importance of column i of P, plus the mean
    importance of row i of Q. s_A (R, D), s_E (R, 1), s_B (E, R): the importance s of every entry of Q, Lambda and P.
    """
    return s_E[:, 0] + s_B.mean(dim=0) + s_A.mean(dim=1)


def budget(step: int, config: Config, layers: int) -> int:
    """Return b(t) of eq. 12, the number of triplets in the whole model that may keep their lambda after step `step`.

    layers: number of adapted layers. The budget is rank * layers up to step tinit. It then falls along a cubic curve.
    From step total_steps - tfinal on, it is target_rank * layers.
    """
    start, target = config.rank * layers, config.target_rank * layers
    end = config.total_steps - config.tfinal
    if step <= config.tinit:
        return start
    if step >= end:
        return target
    # target + (start - target) (1 - (t - t_i) / (T - t_f - t_i))^3, rounded down
    return target + (start - target) * (end - step) ** 3 // (end - config.tinit) ** 3


def largest_mask(scores: Tensor, count: int) -> Tensor:
    """Return a mask (N,) that is True at the `count` largest `scores` (N,). Of equal scores, it takes the first (eq. 6)."""
    order = torch.sort(scores, descending=True, stable=True).indices
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[order[:count]] = True
    return mask


class AdaLoraLinear(AdaptedLayer):
    """A frozen linear layer (..., D) -> (..., E) with an update in the form of an SVD.

    A (R, D), E (R, 1) and B (E, R) train. `base` is an nn.Linear, a quantised subclass, or
    transformers' Conv1D.
    """

    def __init__(self, base: nn.Module, A: Tensor, E: Tensor, B: Tensor, scaling: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.A, self.E, self.B = nn.Parameter(A), nn.Parameter(E), nn.Parameter(B)
        self.scaling, self.dropout = scaling, nn.Dropout(dropout)
        for name, tensor in self.tensors().items():
            zeros = torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
            self.register_buffer(f"exp_avg_ipt_{name}", zeros)
            self.register_buffer(f"exp_avg_unc_{name}", zeros.clone())
        self.register_buffer("mask", torch.ones_like(E, dtype=torch.bool))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return W0 x + scaling P Lambda Q x, shape (..., E) (eq. 3)."""
        h_TR = self.dropout(x_TD) @ (self.A * self.E).T
        y_TE: Tensor = self.base(x_TD) + self.scaling * (h_TR @ self.B.T)
        return y_TE

    def delta(self) -> Tensor:
        """Return scaling P Lambda Q, shape (E, D)."""
        return self.scaling * (self.B @ (self.A * self.E))

    def tensors(self) -> dict[str, nn.Parameter]:
        """Map the names A, E and B to the trainable parameters."""
        return {"A": self.A, "E": self.E, "B": self.B}

    def state(self) -> dict[str, Tensor]:
        """Map names to the averages of A, E and B, and to the mask of the last pruning.

        exp_avg_ipt_A, exp_avg_ipt_E, exp_avg_ipt_B: average sensitivity I_bar. exp_avg_unc_A and so on: average
        uncertainty U_bar. mask: (R, 1), True for the triplets that are kept.
        """
        averages = {f"{kind}_{n}": self.get_buffer(f"{kind}_{n}") for kind in _AVERAGES for n in self.tensors()}
        return averages | {"mask": self.get_buffer("mask")}

    @torch.no_grad()
    def observe(self, beta1: float, beta2: float) -> None:
        """Update the averages I_bar and U_bar of A, E and B (eqs. 8 to 10). Without a gradient, the sensitivity I is 0."""
        for name, w in self.tensors().items():
            I_bar, U_bar = self.get_buffer(f"exp_avg_ipt_{name}"), self.get_buffer(f"exp_avg_unc_{name}")
            grad = torch.zeros_like(w) if w.grad is None else w.grad
            I = sensitivity(w.to(I_bar.dtype), grad.to(I_bar.dtype))  # noqa: E741
            I_bar.copy_(smoothed(I_bar, I, beta1))
            U_bar.copy_(uncertainty(U_bar, I, I_bar, beta2))

    def scores(self) -> Tensor:
        """Return S (R,), the current score of each triplet (eq. 7)."""
        s = {
            name: importance(self.get_buffer(f"exp_avg_ipt_{name}"), self.get_buffer(f"exp_avg_unc_{name}"))
            for name in self.tensors()
        }
        return triplet_scores(s["A"], s["E"], s["B"])

    @torch.no_grad()
    def prune(self) -> None:
        """Set the lambda of each triplet outside the mask to zero (eq. 6)."""
        self.E.masked_fill_(~self.get_buffer("mask"), 0.0)


class AdaLoraConv(AdaLoraLinear):
    """A frozen convolution whose kernel, as a matrix (E, D), has the update of a linear layer.

    A row of the matrix is the kernel of an output channel, so D is
    (input channels / groups) x (product of the kernel's sides).
    """

    base: Convolution

    def forward(self, x: Tensor) -> Tensor:
        """Return W0 * x + (scaling P Lambda Q) * x, e.g. (..., E, H', W') for x (..., C, H, W). A star is a convolution."""
        y: Tensor = self.base(x) + convolve(self.base, self.dropout(x), self.delta(), self.base.groups)
        return y

    def delta(self) -> Tensor:
        """Return scaling P Lambda Q in the shape of the base's kernel."""
        return super().delta().view(self.base.weight.shape)


class AdaLoraAdapted(AdaptedLayers):
    """A model with AdaLoRA layers. The layers share one budget of triplets."""

    def __init__(self, model: nn.Module, layers: Mapping[str, AdaLoraLinear], config: Config) -> None:
        super().__init__(model, layers)
        self.config, self.adalora = config, dict(layers)

    def regularizer(self) -> Tensor | None:
        """Return gamma R(P, Q) over all layers (eq. 4). If gamma is 0, return None."""
        if self.config.orthogonality == 0:
            return None
        return self.config.orthogonality * orthogonality(list(self.adalora.values()), self.config.regularization)

    def after_step(self, step: int) -> None:
        """Update the averages. If the schedule prunes at this step, prune to the budget b(step).

        Call this after optimizer step `step` (from 1) and before zero_grad. The averages are updated before step
        total_steps - tfinal; a tensor without a gradient counts like one whose gradient is zero. After step tinit and
        before step total_steps - tfinal, each step that is a multiple of delta_t prunes. A pruned lambda may grow again
        until the next pruning. Step total_steps - tfinal prunes for the last time, and its mask applies to all later
        steps.
        """
        config, layers = self.config, list(self.adalora.values())
        end = config.total_steps - config.tfinal
        if step < end:
            self.observe()
        if step == end or (config.tinit < step < end and step % config.delta_t == 0):
            masks = largest_mask(torch.cat([layer.scores() for layer in layers]), budget(step, config, len(layers)))
            for layer, mask in zip(layers, masks.split(config.rank), strict=True):
                layer.get_buffer("mask").copy_(mask[:, None])
                layer.prune()
        elif step > end:
            for layer in layers:
                layer.prune()

    def observe(self) -> None:
        """Update the averages I_bar and U_bar of all layers from the gradients."""
        for layer in self.adalora.values():
            layer.observe(self.config.beta1, self.config.beta2)

    def ranks(self) -> dict[str, int]:
        """Map each layer's path to the number of triplets that its last pruning kept."""
        return {path: int(layer.get_buffer("mask").sum()) for path, layer in self.adalora.items()}


def orthogonality(layers: list[AdaLoraLinear], form: str) -> Tensor:
    """Return R(P, Q) over `layers` as a scalar that can be differentiated.

    form: `squared-sum` is the sum of ||P^T P - I||^2 and ||Q Q^T - I||^2 over all layers (Frobenius norms, eq. 4).
    `mean-norm` is the mean of ||P^T P - I|| and ||Q Q^T - I|| over all layers.
    """
    grams = [gram for layer in layers for gram in (layer.B.T @ layer.B, layer.A @ layer.A.T)]
    gaps = [gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device) for gram in grams]
    if form == "squared-sum":
        return torch.stack([gap.square().sum() for gap in gaps]).sum()
    return torch.stack([torch.linalg.matrix_norm(gap) for gap in gaps]).mean()


def attach(model: nn.Module, config: Config, generator: torch.Generator) -> AdaLoraAdapted:
    """Freeze `model` and wrap every target in an AdaLoraLinear or an AdaLoraConv.

    A and B are drawn, in this order, from a normal distribution with standard deviation 0.02. E is 0. `mask` is True for
    the triplets that the last pruning kept, and before it for all. Raises ValueError if a target names no layer of the
    `KINDS`, if target_rank exceeds rank, or if tinit + tfinal is not below total_steps.
    """
    _refuse_contradictions(config)
    found = targets(model, config.targets, KINDS)
    model.requires_grad_(False)
    layers = {}
    for path, base in found.items():
        dtype, device = floating_dtype(base), device_of(base)
        inputs, outputs = features_in_out(base)
        # Drawn in float64 so that every dtype starts from the same numbers.
        A, B = (
            (torch.randn(shape, generator=generator, dtype=torch.float64) * _STD).to(device, dtype)
            for shape in ((config.rank, inputs), (outputs, config.rank))
        )
        E = torch.zeros(config.rank, 1, dtype=dtype, device=device)
        kind = AdaLoraConv if kind_of(base) in CONVOLUTIONS else AdaLoraLinear
        layers[path] = kind(base, A, E, B, config.alpha / (config.rank + _EPS), config.dropout)
        replace(model, path, layers[path])
    return AdaLoraAdapted(model, layers, config)


def _refuse_contradictions(config: Config) -> None:
    if config.target_rank > config.rank:
        raise ValueError(
            f"target_rank {config.target_rank} is above rank {config.rank}: the budget only falls; "
            "raise rank (the paper begins at 1.5 times the target) or lower target_rank"
        )
    if config.tinit + config.tfinal >= config.total_steps:
        raise ValueError(
            f"tinit {config.tinit} + tfinal {config.tfinal} leave no step of total_steps {config.total_steps} to prune in"
        )
