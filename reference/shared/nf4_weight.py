"""A frozen weight in NF4, with or without double quantisation (QLoRA, arXiv:2305.14314, eq. 6). Not a Method."""

from __future__ import annotations

from torch import Tensor

from reference.operations import double_quant, nf4
from reference.shared.quantised_weight import QuantisedWeight


class Nf4Weight(QuantisedWeight):
    """A weight of any shape in NF4. Blocks are consecutive in `W.flatten()`, and may cross rows."""

    codes: Tensor
    """NF4 codes of the weight, packed as two codes per uint8."""
    absmax: Tensor
    """One constant per block of the weight. With double quantisation, these are uint8 codes (c2 in the paper), else
    float32."""
    absmax2: Tensor
    """Second constants (c1 in the paper), float32. Each scales a block of the codes in `absmax`. They exist only with
    double quantisation."""
    offset: Tensor
    """Mean of the constants before double quantisation, float32, 0-d. It exists only with double quantisation."""

    def __init__(self, W: Tensor, block: int, two_levels: bool) -> None:
        """Quantise W, of any shape and floating dtype. two_levels: True to quantise the absmax of the blocks too."""
        super().__init__()
        self.shape, self.block, self.two_levels = W.shape, block, two_levels
        codes, absmax = nf4.quantize(W, block)
        self.register_buffer("codes", nf4.pack(codes))
        if two_levels:
            absmax, absmax2, offset = double_quant.quantize(absmax)
            self.register_buffer("absmax2", absmax2)
            self.register_buffer("offset", offset)
        self.register_buffer("absmax", absmax)

    def constants(self) -> Tensor:
        """Return the absmax of every block in float32 (the inner dequant of eq. 6)."""
        return double_quant.dequantize(self.absmax, self.absmax2, self.offset) if self.two_levels else self.absmax

    def decoded(self) -> Tensor:
        """Return the weight in float32 (doubleDequant of eq. 6)."""
        codes = nf4.unpack(self.codes, self.shape.numel())
        return nf4.dequantize(codes, self.constants(), self.block).view(self.shape)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name: codes and absmax. Double quantisation adds absmax2 and offset."""
        names = ("codes", "absmax", "absmax2", "offset") if self.two_levels else ("codes", "absmax")
        return {name: getattr(self, name) for name in names}
