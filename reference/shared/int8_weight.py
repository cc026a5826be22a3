"""A frozen weight in the 8-bit format of LLM.int8() (arXiv:2208.07339), and a linear layer with it. Not a Method."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reference.operations import int8
from reference.shared.quantised_weight import QuantisedWeight


class Int8Weight(QuantisedWeight):
    """A weight W (E, D) in 8 bits: one code per element, and one absmax per row."""

    codes: Tensor
    """Codes from -127 to 127, int8 (E, D)."""
    absmax: Tensor
    """Largest magnitude of each row, float32 (E,)."""

    def __init__(self, W: Tensor, threshold: float) -> None:
        """Quantise W, of any floating dtype. threshold: magnitude from which a number of the input is an outlier."""
        super().__init__()
        self.threshold = threshold
        codes, absmax = int8.quantize(W)
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)

    def decoded(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight (E, D) in `dtype`."""
        return int8.dequantize(self.codes, self.absmax, dtype)

    def product(self, x: Tensor, training: bool) -> Tensor:
        """Return x W^T in the dtype of x. Outside of training, x is quantised too."""
        return int8.multiply(x, self.codes, self.absmax, self.threshold, training)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name: codes and absmax."""
        return {"codes": self.codes, "absmax": self.absmax}


class Int8Linear(nn.Module):
    """A frozen linear layer with a weight in 8 bits."""

    def __init__(self, packed: Int8Weight, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = packed
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + bias, shape (..., E), in the dtype of x."""
        return add_bias(self.packed.product(x, self.training), self.bias)


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """Return y + bias, or y if there is no bias."""
    return y if bias is None else y + bias
