"""Distances of a tensor from the float64 reference (the truth), and the element that is farthest away."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 1 << 17
"""Number of elements of a block: 1 MiB in float64."""


@dataclass(frozen=True)
class Distance:
    """Distance of a tensor from the truth. All three numbers are divided by the truth's norm."""

    norm: float
    """Norm of the difference."""
    largest: float
    """Largest element of the difference, times the square root of the number of elements."""
    share: float
    """Length of the projection of the difference on the truth."""

    @classmethod
    def of(cls, value: Tensor, truth: Tensor) -> Distance:
        """Return the distance of `value` from `truth`."""
        return _Scaled.of(truth).distance_of(value)


@dataclass(frozen=True)
class _Scaled:
    """The truth in float64, with the numbers that every distance from it needs."""

    truth: Tensor
    """Tensor of the reference in float64."""
    unit: float
    """Largest magnitude in `truth`, or 1 if it is 0 or infinite. Distances are computed in this unit, because the
    squares of numbers below 1e-154 underflow."""
    scale: float
    """Norm of `truth` in this unit, or 1 if the norm is 0."""

    @classmethod
    def of(cls, truth: Tensor) -> _Scaled:
        want = truth.detach().double()
        top = float(torch.linalg.vector_norm(want, torch.inf)) if want.numel() else 0.0
        unit = top if 0 < top < math.inf else 1.0
        norms = [torch.linalg.vector_norm(block / unit) for block in _blocks(want)]
        return cls(want, unit, _norm(norms) or 1.0)

    @property
    def size(self) -> float:
        """Root mean square of `truth`, or 0 if it has no elements."""
        return self.unit * (self.scale / self.truth.numel() ** 0.5) if self.truth.numel() else 0.0

    def distance_of(self, value: Tensor) -> Distance:
        if not self.truth.numel():
            return Distance(0.0, 0.0, 0.0)
        norms, largest, products = list[Tensor](), list[Tensor](), list[Tensor]()
        for have, want in zip(_blocks(value.detach()), _blocks(self.truth), strict=True):
            difference = torch.sub(have.double(), want).div_(self.unit)
            norms.append(torch.linalg.vector_norm(difference))
            largest.append(torch.linalg.vector_norm(difference, torch.inf))
            products.append(difference.mul_(want).div_(self.unit).sum())
        return Distance(
            norm=_norm(norms) / self.scale,
            largest=float(torch.stack(largest).max()) * self.truth.numel() ** 0.5 / self.scale,
            share=abs(float(torch.stack(products).sum())) / self.scale**2,
        )


def _norm(norms: Sequence[Tensor]) -> float:
    """Return the norm of a tensor from the norms of its blocks. A GPU is read once."""
    return math.hypot(*torch.stack([*norms]).tolist())


def _blocks(tensor: Tensor) -> Sequence[Tensor]:
    """Divide a tensor into blocks that fit into a cache. So no temporary tensor is as large as `tensor` in float64."""
    blocks: Sequence[Tensor] = tensor.reshape(-1).split(_BLOCK)
    return blocks


class Distances:
    """Distances of named tensors from the tensors of the same names in the float64 reference.

    subject: the tensors to judge. truth: the tensors of the reference in float64.
    """

    def __init__(self, subject: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
        self.truth = truth
        self._subject, self._scaled, self._own = subject, dict[str, _Scaled](), dict[str, Distance]()

    def of(self, name: str, value: Tensor) -> Distance:
        """Return the distance of `value` from the reference's tensor `name`."""
        return self._of_truth(name).distance_of(value)

    def size(self, name: str) -> float:
        """Return the root mean square of the reference's tensor `name`."""
        return self._of_truth(name).size

    def _of_truth(self, name: str) -> _Scaled:
        if name not in self._scaled:
            self._scaled[name] = _Scaled.of(self.truth[name])
        return self._scaled[name]

    def of_subject(self, name: str) -> Distance:
        """Return the distance of the subject's tensor `name` from the reference's. Later calls return the same object."""
        if name not in self._own:
            self._own[name] = self.of(name, self._subject[name])
        return self._own[name]


def describe_worst_element(value: Tensor, truth: Tensor) -> str:
    """Return text with the index, the value and the expected value of the element with the largest difference."""
    difference = (value.detach().double() - truth.detach().double()).abs().nan_to_num(nan=torch.inf)
    if not difference.numel():
        return ""
    where = place(int(difference.argmax()), difference.shape)
    return f"{list(where)}: {float(value.detach()[where]):.9g}, should be {float(truth.detach()[where]):.9g}"


def place(index: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the position, one index per dimension, of element `index` of a flattened tensor of this shape.

    `torch.unravel_index` does the same, but its first call imports sympy and torch's compiler, which takes seconds.
    """
    found: list[int] = []
    for size in reversed(shape):
        index, within = divmod(index, size)
        found.insert(0, within)
    return tuple(found)
