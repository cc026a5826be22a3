"""Planted faults of QLoRA."""

from __future__ import annotations

from functools import partial

from harness.conformance.faults import FaultCase, line_fault

_USUAL = {"rank": 3, "alpha": 8.0}
CASE = FaultCase(values=_USUAL, inputs=64, outputs=48)

_qlora = partial(line_fault, "qlora", values=_USUAL, inputs=64, outputs=48)
_packed = partial(_qlora, file="nf4_weight")
_experts = partial(_qlora, file="lora_experts", layer="experts")

# fmt: off
FAULTS = [
    _packed("swaps_the_nibbles_when_decoding", ["forward"],
        "nf4.unpack(self.codes, self.shape", "nf4.unpack(self.codes >> 4 | self.codes << 4, self.shape"),
    _packed("forgets_the_offset", ["forward"], "double_quant.dequantize(self.absmax, self.absmax2, self.offset)",
        "double_quant.dequantize(self.absmax, self.absmax2, 0 * self.offset)"),
    _packed("takes_the_absmax_of_the_next_block", ["forward"],
        "if self.two_levels else self.absmax\n", "if self.two_levels else self.absmax.roll(1)\n",
        values={**_USUAL, "double_quant": False}),
    _packed("decodes_with_constants_in_16_bits", ["decoded"],
        "nf4.dequantize(codes, self.constants(), self.block)",
        "nf4.dequantize(codes, self.constants().bfloat16().float(), self.block)", dtype="bfloat16"),
    _packed("does_not_save_the_mean_of_the_constants", ["save"],
        'self.register_buffer("offset", offset)', 'self.register_buffer("offset", offset, persistent=False)'),
    # A cache that survives load_state_dict.
    _packed("keeps_the_weight_that_it_decoded_first", ["save"],
        "nf4.dequantize(codes, self.constants(), self.block)",
        "vars(self).setdefault('_kept', nf4.dequantize(codes, self.constants(), self.block))"),
    _packed("gives_every_weight_the_code_of_zero", ["packing"], "nf4.pack(codes)", "nf4.pack(0 * codes + 7)"),
    _qlora("quantises_the_constants_with_their_mean", ["packing"],
        "quantize_blockwise(flat - offset,", "quantize_blockwise(flat,", file="double_quant"),
    _packed("shares_an_absmax_between_two_blocks", ["packing"],
        "nf4.quantize(W, block)", "nf4.quantize(W, 2 * block)",
        'self.register_buffer("absmax", absmax)', 'self.register_buffer("absmax", absmax.repeat_interleave(2))',
        values={**_USUAL, "double_quant": False}),
    _qlora("forgets_the_scaling", ["forward"],
        "linear(x_TD, self.weight().to(x_TD.dtype), self.base.bias) + self.scaling * (",
        "linear(x_TD, self.weight().to(x_TD.dtype), self.base.bias) + ("),
    _qlora("forgets_the_bias", ["forward"],
        "linear(x_TD, self.weight().to(x_TD.dtype), self.base.bias)", "linear(x_TD, self.weight().to(x_TD.dtype))"),
    _qlora("adds_a_bias_to_a_layer_without_one", ["forward"], "self.weight().to(x_TD.dtype), self.base.bias)",
        "self.weight().to(x_TD.dtype), x_TD.new_ones(self.B.shape[0]) if self.base.bias is None else self.base.bias)"),
    _packed("decodes_its_weight_only_once", ["save"], "codes = nf4.unpack(self.codes, self.shape.numel())\n",
        "if '_kept' not in vars(self):\n            vars(self)['_kept'] = self._decode()\n"
        "        return self._kept\n\n"
        "    def _decode(self):\n        codes = nf4.unpack(self.codes, self.shape.numel())\n"),
    _qlora("runs_on_the_original_weight", ["forward"],
        "linear(x_TD, self.weight().to(x_TD.dtype), self.base.bias)", "self.base(x_TD)"),
    _qlora("merges_into_the_original", ["merge"],
        "dense.weight.copy_(self.weight().to(dense.weight.dtype) + self.delta()",
        "dense.weight.copy_(dense.weight + self.delta()"),
    # peft merges into 4 and 8 bits like this.
    _qlora("merges_the_bias_of_b_without_the_scaling", ["merge"],
        "add_bias(dense, self.scaling * self.c)", "add_bias(dense, self.c)", values={**_USUAL, "lora_bias": True}),
    _qlora("decodes_the_weights_of_all_layers_into_one_buffer", ["model"],
        "linear(x_TD, self.weight().to(x_TD.dtype), self.base.bias)",
        "linear(x_TD, globals().setdefault('_buffer', torch.empty(self.weight().shape.numel(), dtype=x_TD.dtype))"
        ".view(self.weight().shape).data.copy_(self.weight()), self.base.bias)"),
    _experts("quantises_the_first_expert_only", ["packing"],
        "codes, absmax = nf4.quantize(W, block)", "codes, absmax = nf4.quantize(W[:1].expand_as(W), block)",
        file="nf4_weight"),
    _experts("runs_experts_on_their_original_weights", ["forward"],
        "return decoded.to(self.A[name].dtype)", "return self.base.get_parameter(name)"),
    _experts("packs_only_the_first_projection", ["forward"], "decoded: Tensor = packed.decoded()",
        "decoded: Tensor = packed.decoded() if name != 'down_proj' else self.base.get_parameter(name)"),
    _experts("merges_into_the_original_experts", ["merge"],
        ".copy_(self.weight(name) + self.update(name))", ".add_(self.update(name))"),
    _experts("decodes_the_down_projection_with_the_scales_of_the_other", ["forward"],
        "packed: Any = self.packed[name]\n",
        "packed: Any = self.packed[name]\n        first: Any = next(iter(self.packed.values()))\n"
        "        packed = copy.copy(packed)\n        packed.constants = lambda n=len(self.packed[name].constants()): "
        "first.constants()[:n]\n"),
]
# fmt: on
