"""LoRA on layers other than linear ones: embedding tables and convolutions. LoRA, DoRA, AdaLoRA and PiSSA use them.

The paper adapts matrices, so the layers here treat their weights as matrices. Shape letters: N entries of a table, E
outputs, R rank, C input channels, G groups, K sides of a kernel: one, two or three numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from reference.shared.adapted import LowRankLayer
from reference.shared.layers import Convolution, dense_copy

_CONVOLVE: Mapping[int, Callable[..., Tensor]] = {
    3: nn.functional.conv1d, 4: nn.functional.conv2d, 5: nn.functional.conv3d
}  # fmt: skip
"""Number of dimensions of a kernel -> function that convolves with it."""


class LoraEmbedding(LowRankLayer):
    """A frozen embedding table (N, E) with a low-rank update. This is LoRA on a linear layer whose inputs are one-hot rows.

    A (R, N) and B (E, R) train. If the base has an `embed_scale`, the update is multiplied by it too, as after merging.
    The column of A at padding_idx has no gradient, and scale_grad_by_freq divides the gradient of a column of A by the
    count of its entry in the batch. Neither changes the gradient of B. Raises ValueError for a base with max_norm, which
    rewrites the table in every forward pass.
    """

    base: nn.Embedding

    def __init__(self, base: nn.Embedding, A: Tensor, B: Tensor, scaling: float) -> None:
        if base.max_norm is not None:
            raise ValueError("an embedding with max_norm rewrites its own weight, which LoRA holds frozen")
        super().__init__(base, A, B, scaling)

    def forward(self, ids_T: Tensor) -> Tensor:
        """Return W0[ids] + scaling (A^T B^T)[ids], shape (..., E). The ids have shape (...,) and an integer dtype."""
        a_TR = nn.functional.embedding(
            ids_T, self.A.T, self.base.padding_idx, scale_grad_by_freq=self.base.scale_grad_by_freq
        )
        scale: Any = getattr(self.base, "embed_scale", 1.0)
        if isinstance(scale, Tensor):
            scale = scale.to(self.A.dtype)
        y_TE: Tensor = self.base(ids_T) + self.scaling * (a_TR @ self.B.T) * scale
        return y_TE


class LoraConv(LowRankLayer):
    """A frozen convolution (E, C/G, *K) with an update in two parts, as in HF peft: a convolution A, then a convolution B.

    A (R, C, *K) reads all C channels and has the stride, padding, padding mode and dilation of the base. B (E, R/G, 1,
    ...) has the groups of the base. Seen as a matrix, whose rows are the kernels of the outputs, the update has a rank of
    up to R. Raises ValueError if G does not divide R.
    """

    base: Convolution

    def forward(self, x: Tensor) -> Tensor:
        """Return W0 * x + scaling (B * (A * x) + c), e.g. (..., E, H', W') for x (..., C, H, W). A star is a convolution."""
        h = convolve(self.base, self.dropout(x), self.A, groups=1)
        y: Tensor = self.base(x) + self.scaling * pointwise(h, self.B, self.base.groups)
        return self.with_bias(y, dim=1 - self.A.dim())

    def delta(self) -> Tensor:
        """Return scaling B A as a kernel (E, C, *K). It has no groups, because each output sees every input channel."""
        G = self.base.groups
        R, C, *K = self.A.shape
        B_GER, A_GRD = self.B.reshape(G, -1, R // G), self.A.reshape(G, R // G, -1)
        return self.scaling * (B_GER @ A_GRD).reshape(-1, C, *K)

    def dense_base(self) -> nn.Module:
        """Return a copy of the base as a convolution without groups, because the update has none."""
        return ungrouped(self.base)


class LoraConv2dKernel(LowRankLayer):
    """A frozen convolution (E, C/G, K, K) with a square kernel. Its update is B A, reshaped to the kernel as in loralib.

    A is (R K, C K) and B is (E/G K, R K). B A has a rank of up to R K, and is reshaped row by row. Raises ValueError
    for a kernel that is not square.
    """

    base: nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        """Return W0 * x + (scaling B A) * x + scaling c, shape (..., E, H', W'), for x (..., C, H, W).

        A star is a convolution.
        """
        y: Tensor = self.base(x) + convolve(self.base, self.dropout(x), self.delta(), self.base.groups)
        return self.with_bias(y, dim=-3)

    def delta(self) -> Tensor:
        """Return scaling B A in the shape of the base's kernel, (E, C/G, K, K)."""
        return super().delta().view(self.base.weight.shape)


def convolve(base: Convolution, x: Tensor, kernel: Tensor, groups: int) -> Tensor:
    """Return the convolution of x with `kernel` (E, C/groups, *K), without bias, e.g. (..., E, H', W') for x (..., C, H, W).

    Stride, padding, padding mode and dilation are those of `base`.
    """
    padding: Any = base.padding
    if base.padding_mode != "zeros":
        x, padding = nn.functional.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
    return _CONVOLVE[kernel.dim()](x, kernel, None, base.stride, padding, base.dilation, groups)


def pointwise(x: Tensor, kernel: Tensor, groups: int = 1) -> Tensor:
    """Return the convolution of x with `kernel` (E, R/groups, 1, ...), e.g. (..., E, H, W) for x (..., R, H, W).

    It maps the R channels of each place to E channels.
    """
    return _CONVOLVE[kernel.dim()](x, kernel, groups=groups)


def ungrouped(base: Convolution) -> Convolution:
    """Return a convolution with one group and the same output as `base`, whose kernel is (E, C/G, *K).

    The new kernel (E, C, *K) is 0 for channels of other groups.
    """
    whole = dense_copy(base)
    assert isinstance(whole, Convolution)  # noqa: S101
    G, (E, c, *K) = base.groups, base.weight.shape
    kernel = base.weight.new_zeros(G, E // G, G, c, *K)
    for g, of_group in enumerate(base.weight.detach().view(G, E // G, c, *K)):
        kernel[g, :, g] = of_group
    whole.weight, whole.groups = nn.Parameter(kernel.view(E, G * c, *K), requires_grad=False), 1
    return whole
