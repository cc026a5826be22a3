"""Planted faults of LoRA over 8-bit weights, and of a layer on 8-bit codes alone."""

from __future__ import annotations

from functools import partial

from harness.conformance.faults import line_fault

_USUAL = {"rank": 3, "alpha": 8.0, "threshold": 2.5}
_BIASED = {**_USUAL, "lora_bias": True}

_layer = partial(line_fault, "lora_int8", values=_USUAL)
_form = partial(_layer, file="int8")

_alone = partial(line_fault, "int8_linear", values={"shape": [24, 40], "rows": [9], "threshold": 2.5}, file="int8")

_CODES = "codes = (half * (LARGEST_CODE / absmax)[..., None]).round()"
_BIAS = "c if bias is None else bias + c.to(bias.dtype)"
_MERGED = "Int8Weight(self.packed.decoded(wide) + delta.to(wide), self.packed.threshold)"

# fmt: off
FAULTS = [
    _form("takes_the_absmax_of_the_columns", ["packing"],
        "absmax = half.abs().amax(dim=-1)",
        "absmax = half.abs().amax(dim=0).repeat(half.shape[0])[:half.shape[0]]"),
    _form("takes_one_absmax_for_the_whole_matrix", ["packing"],
        "absmax = half.abs().amax(dim=-1)", "absmax = half.abs().amax().expand(half.shape[:-1]).clone()"),
    _form("truncates_in_place_of_rounding", ["packing", "strides"], _CODES, _CODES.replace("round", "trunc")),
    _form("scales_by_128_when_quantising", ["packing"],
        _CODES, "codes = (half * (128 / absmax)[..., None]).round().clamp(-128, 127)"),
    _form("keeps_codes_in_four_bytes", ["packing"], "return codes.to(torch.int8), absmax", "return codes, absmax"),
    _form("decodes_with_128", ["forward", "gradient"],
        "(absmax.to(wide) / LARGEST_CODE)[..., None]", "(absmax.to(wide) / 128)[..., None]"),
    # bitsandbytes 0.50.2 on the CPU: 6.200124e-05 in place of 1 / 127^2, which is 6.200012e-05
    _form("mistypes_the_factor_of_the_products", ["strides"],
        "absmax.to(wide) / LARGEST_CODE**2", "absmax.to(wide) * 6.200124e-05"),
    _form("quantises_without_rounding_to_float16", ["packing"],
        "half = X.detach().to(torch.float16).float()\n    absmax", "half = X.detach().float()\n    absmax"),
    _form("leaves_the_outlier_columns_out", ["strides"], "[:, column]) if column.any()", "[:, column]) * 0 if column.any()"),
    _form("multiplies_outlier_columns_twice", ["strides"], "X_codes.masked_fill(column, 0)", "X_codes"),
    _form("keeps_outliers_in_the_absmax", ["strides"],
        "quantize(X.masked_fill(outlier, 0))", "quantize(X)"),
    _form("takes_outliers_by_their_sign", ["strides"],
        "X.to(torch.float16).abs() >= threshold", "X.to(torch.float16) >= threshold"),
    _form("quantises_the_input_in_training", ["forward"], "if training:", "if False:"),
    _form("does_not_quantise_the_input", ["strides"], "if training:", "if True:"),
    _form("passes_no_gradient_in_eval_mode", ["strides"], " + (Y - Y.detach())", " + 0 * Y.detach()"),
    _layer("ignores_the_threshold", ["strides"],
        "dense_weight(base).detach(), config.threshold)", "dense_weight(base).detach(), 0.0)"),
    _layer("multiplies_by_the_original_weight", ["forward"],
        "add_bias(self.packed.product(x_TD, self.training), self.base.bias)", "self.base(x_TD)"),
    _layer("forgets_the_bias_of_the_base", ["forward"],
        "add_bias(self.packed.product(x_TD, self.training), self.base.bias)", "self.packed.product(x_TD, self.training)"),
    _layer("quantises_the_input_of_the_adapter", ["forward", "gradient"],
        "h_TR = self.dropout(x_TD) @", "h_TR = (x_TD * 16).round() / 16 @"),
    _layer("merges_without_the_scaling", ["merge"], "delta = self.delta()", "delta = self.B @ self.A"),
    _layer("merges_into_the_original_weight", ["merge"],
        _MERGED, _MERGED.replace("self.packed.decoded(wide)", "self.base.weight.to(wide)")),
    _layer("merges_and_does_not_quantise_again", ["merge"],
        _MERGED, "self.packed.__class__(delta.to(wide), 0.0)\n        weight = self.packed.decoded(wide) + delta.to(wide)\n"
        "        packed.product = lambda x, training: nn.functional.linear(x, weight.to(x.dtype))"),
    _layer("merges_into_codes_with_the_old_absmax", ["merge"],
        _MERGED, _MERGED + "\n        packed.absmax.copy_(self.packed.absmax)"),
    _layer("merges_with_another_threshold", ["merge"], _MERGED, _MERGED.replace("self.packed.threshold", "0.0")),
    _layer("loses_the_bias_when_it_merges", ["merge"], "Int8Linear(packed, bias)", "Int8Linear(packed, None)"),
    _layer("loses_the_bias_of_b_when_it_merges", ["merge"], _BIAS, "bias", values=_BIASED, model="wide"),
    _layer("merges_the_bias_of_b_twice", ["merge"], _BIAS, "bias + 2 * c.to(bias.dtype)", values=_BIASED, model="wide"),
    # peft 0.21.2
    _layer("merges_the_bias_of_b_without_the_scaling", ["merge"],
        "c = self.scaling * self.c", "c = self.c.detach()", values=_BIASED, model="wide"),
    _layer("adds_the_bias_of_b_to_the_base_too", ["merge"], _BIAS,
        "bias.data.add_(c)", values=_BIASED, model="wide"),
    _alone("scales_by_128_in_place_of_127", ["outputs"], "absmax.to(wide) / LARGEST_CODE**2", "absmax.to(wide) / 128**2"),
    _alone("rounds_the_products_of_outliers_to_codes", ["outputs"],
        "linear(X[..., column], dequantize", "linear(X[..., column].round(), dequantize"),
    _alone("takes_only_columns_full_of_outliers", ["outputs"],
        "outlier.flatten(0, -2).any(dim=0)", "outlier.flatten(0, -2).all(dim=0)"),
    _alone("has_no_gradient_in_eval_mode", ["backward"], "product(X, codes, absmax, threshold) + (Y - Y.detach())",
        "product(X, codes, absmax, threshold)"),
]
# fmt: on
