"""Faults of QLoRA."""

from __future__ import annotations

from functools import partial

from harness.conformance.faults import FaultCase, line_fault

_USUAL = {"rank": 3, "alpha": 8.0}
CASE = FaultCase(values=_USUAL, inputs=64, outputs=48)

_qlora = partial(line_fault, "qlora", values=_USUAL, inputs=64, outputs=48)

# fmt: off
FAULTS = [
    _qlora("swaps_the_nibbles_when_decoding", ["forward"],
        "nf4.unpack(self.codes, E * D)", "nf4.unpack(self.codes >> 4 | self.codes << 4, E * D)"),
    _qlora("forgets_the_offset", ["forward"], "double_quant.dequantize(self.absmax, self.absmax2, self.offset)",
        "double_quant.dequantize(self.absmax, self.absmax2, 0 * self.offset)"),
    _qlora("takes_the_absmax_of_the_next_block", ["forward"],
        "        absmax = self.absmax\n", "        absmax = self.absmax.roll(1)\n",
        values={**_USUAL, "double_quant": False}),
    _qlora("gives_every_weight_the_code_of_zero", ["packing"], "nf4.pack(codes)", "nf4.pack(0 * codes + 7)"),
    _qlora("quantises_the_constants_with_their_mean", ["packing"],
        "quantize_blockwise(flat - offset,", "quantize_blockwise(flat,", file="double_quant"),
    _qlora("shares_an_absmax_between_two_blocks", ["packing"],
        "nf4.quantize(dense_weight(base), config.block)", "nf4.quantize(dense_weight(base), 2 * config.block)",
        'self.register_buffer("absmax", absmax)', 'self.register_buffer("absmax", absmax.repeat_interleave(2))',
        values={**_USUAL, "double_quant": False}),
    _qlora("forgets_the_scaling", ["forward"],
        "linear(x_TD, self.weight().to(x_TD.dtype), self.base.bias) + self.scaling * (",
        "linear(x_TD, self.weight().to(x_TD.dtype), self.base.bias) + ("),
    _qlora("forgets_the_bias", ["forward"],
        "linear(x_TD, self.weight().to(x_TD.dtype), self.base.bias)", "linear(x_TD, self.weight().to(x_TD.dtype))"),
    _qlora("adds_a_bias_to_a_layer_without_one", ["forward"], "self.weight().to(x_TD.dtype), self.base.bias)",
        "self.weight().to(x_TD.dtype), x_TD.new_ones(self.B.shape[0]) if self.base.bias is None else self.base.bias)"),
    _qlora("decodes_its_weight_only_once", ["save"], "return nf4.dequantize(nf4.unpack(self.codes, E * D), absmax,",
        "if '_kept' not in vars(self):\n            vars(self)['_kept'] = self._decode(absmax)\n"
        "        return self._kept\n\n"
        "    def _decode(self, absmax):\n        E, D = self.base.out_features, self.base.in_features\n"
        "        return nf4.dequantize(nf4.unpack(self.codes, E * D), absmax,"),
    _qlora("runs_on_the_original_weight", ["forward"],
        "linear(x_TD, self.weight().to(x_TD.dtype), self.base.bias)", "self.base(x_TD)"),
    _qlora("merges_into_the_original", ["merge"],
        "dense.weight.copy_(self.weight().to(dense.weight.dtype) + self.delta()",
        "dense.weight.copy_(dense.weight + self.delta()"),
    # peft merges into 4 and 8 bits like this.
    _qlora("merges_the_bias_of_b_without_the_scaling", ["merge"],
        "add_bias(dense, self.scaling * self.c)", "add_bias(dense, self.c)", values={**_USUAL, "lora_bias": True}),
]
# fmt: on
