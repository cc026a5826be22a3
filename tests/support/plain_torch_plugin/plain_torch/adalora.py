"""AdaLoRA (arXiv:2303.10512): h = W0 x + s P Lambda Q x, with a budget of triplets. Here B is P, E is Lambda and A is Q."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from plain_torch.adapted import Adapted, AdapterLayer, replace
from plain_torch.factors import Generator, normal, trained
from plain_torch.layers import convolve, kind_of, layer_dtype, matrix, sizes, wide, with_matrix, with_weight

KINDS = ("linear", "Conv1D", "Conv2d")
LETTERS = "AEB"


def averaged(
    w: Tensor, gradient: Tensor, ipt: Tensor, unc: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    """Return the new averages of sensitivity |w dL/dw| and uncertainty (eqs. 8 to 10), in the dtype of the old ones."""
    new = (w.to(ipt.dtype) * gradient.to(ipt.dtype)).abs()
    ipt = beta1 * ipt + (1 - beta1) * new
    return ipt, beta2 * unc + (1 - beta2) * (new - ipt).abs()


def triplet_scores(scores: dict[str, Tensor]) -> Tensor:
    """Return the score of every triplet (eq. 7): that of its lambda plus the means of those of its vectors."""
    return scores["E"][:, 0] + scores["A"].mean(dim=1) + scores["B"].mean(dim=0)


class AdaLoraLayer(AdapterLayer):
    """Linear layer, Conv1D or convolution with an update in the form of an SVD."""

    def __init__(self, base: nn.Module, config: Any, generator: Generator) -> None:
        super().__init__(base)
        self.convolution = kind_of(base) == "Conv2d"
        outputs, inputs = base.weight.flatten(1).shape if self.convolution else sizes(base)
        dtype, rank = layer_dtype(base), config.rank
        self.scaling, self.dropout = config.alpha / (rank + 1e-5), config.dropout
        self.A = trained(normal((rank, inputs), 0.02, generator), base, dtype)
        self.E = trained(torch.zeros(rank, 1), base, dtype)
        self.B = trained(normal((outputs, rank), 0.02, generator), base, dtype)
        for letter in LETTERS:
            for name in ("ipt", "unc"):
                self.register_buffer(
                    f"exp_avg_{name}_{letter}", torch.zeros_like(getattr(self, letter), dtype=wide(dtype))
                )
        self.register_buffer("mask", torch.ones_like(self.E, dtype=torch.bool))

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return s P Lambda Q as a matrix (E, D), computed in `dtype`."""
        return self.scaling * ((self.B.to(dtype) * self.E[:, 0].to(dtype)) @ self.A.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        dropped = functional.dropout(x, self.dropout, self.training) if self.dropout else x
        if self.convolution:
            kernel = self.delta(self.A.dtype).reshape(self.base.weight.shape)
            return self.base(x) + convolve(self.base, dropped, kernel, None, self.base.groups)
        return self.base(x) + self.scaling * functional.linear(
            functional.linear(dropped, self.A) * self.E[:, 0], self.B
        )

    def merged(self) -> nn.Module:
        delta = self.delta(wide(self.A.dtype))
        if self.convolution:
            return with_weight(self.base, self.base.weight + delta.reshape(self.base.weight.shape))
        return with_matrix(self.base, matrix(self.base) + delta, self.base.bias)

    def observe(self, beta1: float, beta2: float) -> None:
        """Update the averages. A tensor without a gradient counts like one whose gradient is zero."""
        for letter in LETTERS:
            w = getattr(self, letter)
            ipt, unc = getattr(self, f"exp_avg_ipt_{letter}"), getattr(self, f"exp_avg_unc_{letter}")
            gradient = torch.zeros_like(w) if w.grad is None else w.grad
            for old, new in zip((ipt, unc), averaged(w, gradient, ipt, unc, beta1, beta2), strict=True):
                old.copy_(new)

    def scores(self) -> Tensor:
        """Return the score of every triplet."""
        averages = {x: (getattr(self, f"exp_avg_ipt_{x}"), getattr(self, f"exp_avg_unc_{x}")) for x in LETTERS}
        return triplet_scores({letter: ipt * unc for letter, (ipt, unc) in averages.items()})

    def gaps(self) -> list[Tensor]:
        """Return P^T P - I and Q Q^T - I."""
        grams = (self.B.T @ self.B, self.A @ self.A.T)
        return [gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device) for gram in grams]


class AdaLora(Adapted):
    """A model with AdaLoRA layers, its regulariser and its allocator of the budget."""

    def __init__(self, model: nn.Module, layers: dict[str, AdaLoraLayer], config: Any) -> None:
        super().__init__(model, layers)
        self.config = config

    def regularizer(self) -> Tensor | None:
        """Return gamma R(P, Q) over all layers (eq. 4), or None if gamma is 0."""
        if not self.config.orthogonality:
            return None
        gaps = [gap for layer in self.layers.values() for gap in layer.gaps()]
        if self.config.regularization == "squared-sum":
            return self.config.orthogonality * torch.stack([gap.square().sum() for gap in gaps]).sum()
        return self.config.orthogonality * torch.stack([torch.linalg.matrix_norm(gap) for gap in gaps]).mean()

    def budget(self, step: int) -> int:
        """Return the number of triplets that a pruning at `step` keeps (eq. 12)."""
        config, count = self.config, len(self.layers)
        first, last = config.rank * count, config.target_rank * count
        left, span = config.total_steps - config.tfinal - step, config.total_steps - config.tfinal - config.tinit
        return last + (first - last) * left**3 // span**3

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Update the averages after optimizer step `step`, and prune if the schedule prunes now."""
        config, layers = self.config, list(self.layers.values())
        end = config.total_steps - config.tfinal
        if step < end:
            for layer in layers:
                layer.observe(config.beta1, config.beta2)
        prunes = step == end or (config.tinit < step < end and step % config.delta_t == 0)
        if prunes:
            order = torch.cat([layer.scores() for layer in layers]).argsort(descending=True, stable=True)
            keeps = torch.zeros_like(order, dtype=torch.bool)
            keeps[order[: self.budget(step)]] = True
            for layer, mask in zip(layers, keeps.split(config.rank), strict=True):
                layer.mask.copy_(mask[:, None])
        if prunes or step > end:
            for layer in layers:
                layer.E.masked_fill_(~layer.mask, 0)


def attach(model: nn.Module, config: Any, generator: Generator) -> Adapted:
    """Wrap every target in an AdaLoRA layer."""
    if config.target_rank > config.rank:
        raise ValueError("target_rank exceeds rank")
    if config.tinit + config.tfinal >= config.total_steps:
        raise ValueError("tinit + tfinal is not below total_steps")
    layers = replace(model, config.targets, KINDS, lambda base: AdaLoraLayer(base, config, generator))
    return AdaLora(model, layers, config)
