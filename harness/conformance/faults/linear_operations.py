"""Planted faults of two groups of Operations: the adapted linear layers, and the importance scores of AdaLoRA."""

from __future__ import annotations

from functools import partial

from harness.conformance.faults import line_fault

_PLAIN = {"shape": [24, 40], "rows": [9], "rank": 3}
_DROP = {**_PLAIN, "dropout": 0.25}
_PACKED = {"shape": [48, 65], "rows": [9], "rank": 3, "dropout": 0.25}
_SQUARE = {"shape": [24, 24], "rows": [9], "rank": 24}
_SCORED = {"shape": [24, 40], "rank": 3}
_LORA_DOWN = "h_TR = self.dropout(x_TD) @ self.A.T"
_LORA_SUM = "self.base(x_TD) + self.scaling * (h_TR @ self.B.T)"
_NORM = "norms(self.direction(W0_ED), self.per)\n        g = self.gain"
_DORA_SUM = "(g - 1) * (dropped_TD @ W0_ED.T) + g * self.scaling * (dropped_TD @ self.A.T @ self.B.T)"

_lora = partial(line_fault, "lora_linear", file="lora", values=_PLAIN)
_lora_drop = partial(line_fault, "lora_linear", file="lora", values=_DROP)
_packed = partial(line_fault, "nf4_lora_linear", values=_PACKED)
_dora = partial(line_fault, "dora_linear", file="dora", values=_PLAIN)
_vera = partial(line_fault, "vera_linear", file="vera", values=_PLAIN)
_dora_large = partial(line_fault, "dora_linear", file="dora", values={**_PLAIN, "kind": "large-rows"}, dtype="float16")
_importance = partial(line_fault, "adalora_importance", file="adalora", values=_SCORED)

# fmt: off
FAULTS = [
    _lora("leaves_the_scaling_out", ["outputs", "backward"], _LORA_SUM, "self.base(x_TD) + h_TR @ self.B.T"),
    _lora_drop("drops_from_the_base_too", ["outputs", "backward"],
        _LORA_SUM, "self.base(self.dropout(x_TD)) + self.scaling * (h_TR @ self.B.T)"),
    # Use the mask as if its values were 0 and 1.
    _lora_drop("drops_without_scaling_up", ["outputs", "backward"],
        _LORA_DOWN, "h_TR = (x_TD * (self.dropout.mask != 0)) @ self.A.T"),
    _lora_drop("ignores_the_mask", ["outputs", "backward"], _LORA_DOWN, "h_TR = x_TD @ self.A.T"),
    # Compute the right output, but leave dropout out of the gradient of x through the update.
    _lora_drop("forgets_the_mask_in_the_backward_pass", ["backward"],
        _LORA_DOWN, "h_TR = (x_TD + (self.dropout(x_TD) - x_TD).detach()) @ self.A.T"),
    _lora("reads_transposed_tokens_in_the_order_of_the_memory", ["layouts"], _LORA_DOWN,
        "swapped = x_TD.dim() == 3 and min(x_TD.shape[:2]) > 1 and x_TD.transpose(0, 1).is_contiguous()\n"
        "        x_TD = x_TD.transpose(0, 1).reshape(x_TD.shape) if swapped else x_TD\n"
        "        h_TR = x_TD @ self.A.T", values={**_PLAIN, "rows": [2, 31]}),
    _lora("scales_forward_only", ["backward"],
        _LORA_SUM, "self.base(x_TD) + (u := h_TR @ self.B.T) + (self.scaling - 1) * u.detach()"),
    _lora("gives_no_gradient_if_its_input_needs_none", ["calls"],
        _LORA_DOWN, "h_TR = self.dropout(x_TD) @ (self.A if x_TD.requires_grad else self.A.detach()).T"),
    _lora("forgets_the_bias", ["outputs"],
        "apply_layer(lora.LoraLinear(dense_linear(W, bias),", "apply_layer(lora.LoraLinear(dense_linear(W, None),",
        file=""),
    _packed("drops_from_the_base_too", ["outputs", "backward"],
        _LORA_SUM, "self.base(self.dropout(x_TD)) + self.scaling * (h_TR @ self.B.T)", file="lora"),
    # Stop the gradient of x at the frozen weight.
    _packed("passes_no_gradient_through_the_packed_weight", ["backward"],
        _LORA_SUM, "self.base(x_TD).detach() + self.scaling * (h_TR @ self.B.T)", file="lora"),
    _packed("starts_a_block_at_every_row", ["outputs"], "_FORM.dequantize(packed, absmax, block, shape, x.dtype)",
        "_FORM.dequantize(packed, absmax[: shape[0]].repeat_interleave(shape[1]), 1, shape, x.dtype)"),
    _packed("ignores_the_block_size", ["outputs"], "_FORM.dequantize(packed, absmax, block, shape, x.dtype)",
        "_FORM.dequantize(packed, absmax.repeat(2), 64, shape, x.dtype)", values={**_PACKED, "block": 128}),
    _packed("rounds_the_constants_to_16_bits", ["decoded"], "_FORM.dequantize(packed, absmax, block, shape, x.dtype)",
        "_FORM.dequantize(packed, absmax.to(x.dtype).float(), block, shape, x.dtype)", dtype="bfloat16"),
    line_fault("nf4_linear", "multiplies_levels_and_constants_in_16_bits", ["decoded"],
        "_FORM.dequantize(packed, absmax, block, shape, x.dtype)",
        "_FORM.dequantize(packed, torch.ones_like(absmax), block, shape, x.dtype).view(-1)\n"
        "        .mul(absmax.repeat_interleave(block)[: shape[0] * shape[1]].to(x.dtype)).view(shape)",
        values={"shape": [48, 65], "rows": [9]}, dtype="bfloat16"),
    _packed("forgets_the_bias", ["outputs"],
        "shape, x.dtype), bias)", "shape, x.dtype), None)", values={**_PACKED, "bias": True}),
    # Follow the paper's eq. 6, but not section 4.3 and the authors' code.
    _dora("does_not_detach_the_norm", ["backward"], "norm.detach() if self.detach_norm else norm", "norm"),
    _dora("takes_the_norm_of_columns", ["outputs"], "dim=1 if per", "dim=0 if per", values=_SQUARE),
    _dora("divides_by_the_norm_of_the_base", ["outputs", "backward"],
        _NORM, "norms(W0_ED, self.per)\n        g = self.gain"),
    _dora("leaves_the_scaling_out_of_the_norm", ["outputs", "backward"],
        _NORM, "norms(W0_ED + self.B @ self.A, self.per)\n        g = self.gain"),
    _dora_large("sums_the_squares_of_a_norm_in_float16", ["outputs", "backward"],
        'torch.linalg.vector_norm(V_ED, dim=1 if per == "output" else 0)', "V_ED.square().sum(dim=1).sqrt()"),
    # Compute g (V x) with dropout on all of x; without dropout the result is the same.
    _dora("drops_from_all_of_the_weight", ["outputs", "backward"],
        "self.base(x_TD) + added_TE", "self.base(dropped_TD) + added_TE", values=_DROP),
    # Apply dropout to the update only, as LoRA does.
    _dora("drops_from_the_update_alone", ["outputs", "backward"],
        _DORA_SUM, _DORA_SUM.replace("dropped_TD", "x_TD", 1), values=_DROP),
    _dora("scales_the_bias_by_the_magnitude", ["outputs"],
        "self.base(x_TD) + added_TE", "self.base(x_TD) + added_TE + (g - 1) * self.base.bias"),
    _dora("adds_the_update_without_its_magnitude", ["outputs", "backward"],
        _DORA_SUM, _DORA_SUM.replace("g * self.scaling", "self.scaling")),
    _dora("divides_zero_by_zero_in_a_layer", ["outputs", "backward"],
        "return torch.where(some, m, 0.0) / torch.where(some, norm, 1.0)", "return m / norm",
        values={**_PLAIN, "kind": "zero-rows"}),
    # Compute ||W||^2 + 2 s <W, B A> + s^2 ||B A||^2. The formula is correct, but its largest term limits its accuracy.
    _dora("computes_the_norm_from_products", ["outputs", "backward"], _NORM,
        "s, A, B = self.scaling, self.A, self.B\n"
        "        cross, own = ((W0_ED @ A.T) * B).sum(1), ((B @ (A @ A.T)) * B).sum(1)\n"
        "        norm = (W0_ED.square().sum(1) + 2 * s * cross + s**2 * own).clamp(min=0).sqrt()\n"
        "        g = self.gain",
        values={"shape": [48, 128], "rows": [9], "rank": 3, "kind": "cancelled"}),
    _vera("swaps_b_and_d", ["outputs", "backward"], "h_TR = self.d *", "h_TR = self.b *",
        "+ self.b * (h_TR @", "+ self.d * (h_TR @", values=_SQUARE),
    _vera("leaves_out_d", ["outputs", "backward"],
        "h_TR = self.d * (self.dropout(x_TD) @ self.A.T)", "h_TR = self.dropout(x_TD) @ self.A.T"),
    _vera("scales_the_base_by_b_too", ["outputs", "backward"],
        "self.base(x_TD) + self.b * (h_TR @ self.B.T)", "self.b * (self.base(x_TD) + h_TR @ self.B.T)"),
    _vera("drops_from_the_base_too", ["outputs", "backward"],
        "self.base(x_TD) + self.b", "self.base(self.dropout(x_TD)) + self.b", values=_DROP),
    # Apply the first R columns of the mask to the output of A.
    _vera("drops_after_the_first_projection", ["outputs", "backward"], "self.d * (self.dropout(x_TD) @ self.A.T)",
        "self.d * self.dropout.mask[..., : len(self.d)] * (x_TD @ self.A.T)", values=_DROP),
    _vera("trains_b_alone", ["backward"], "h_TR = self.d *", "h_TR = self.d.detach() *"),
    _importance("swaps_the_two_betas", ["outputs"],
        "layer.observe(beta1, beta2)", "layer.observe(beta2, beta1)", file=""),
    _importance("measures_uncertainty_by_the_previous_average", ["outputs"], "I_bar.copy_(smoothed(I_bar, I, beta1))",
        "old = I_bar.clone()\n            I_bar.copy_(smoothed(I_bar, I, beta1))",
        "uncertainty(U_bar, I, I_bar, beta2)", "uncertainty(U_bar, I, old, beta2)"),
    _importance("scores_a_triplet_by_its_smallest_weight", ["outputs"],
        "s_B.mean(dim=0) + s_A.mean(dim=1)", "s_B.amin(dim=0) + s_A.amin(dim=1)"),
    _importance("sums_instead_of_averaging", ["outputs"],
        "s_B.mean(dim=0) + s_A.mean(dim=1)", "s_B.sum(dim=0) + s_A.sum(dim=1)"),
    _importance("averages_over_the_other_axis", ["outputs"],
        "s_B.mean(dim=0) + s_A.mean(dim=1)", "s_B.mean(dim=1) + s_A.mean(dim=0)",
        values={"shape": [24, 24], "rank": 24}),
    _importance("scores_by_sensitivity_alone", ["outputs"], "return I_bar * U_bar", "return I_bar"),
    _importance("keeps_the_sign_of_a_sensitivity", ["outputs"], "return (w * grad).abs()", "return w * grad"),
    _importance("multiplies_in_the_dtype_of_the_weights", ["outputs"],
        "sensitivity(w.to(I_bar.dtype), grad.to(I_bar.dtype))", "sensitivity(w, grad).to(I_bar.dtype)",
        dtype="bfloat16"),
    _importance("changes_its_averages_in_place", ["arguments"], "    return (*averages, layer.scores())",
        "    given['I_A'].copy_(averages[0])\n    return (*averages, layer.scores())", file=""),
    # Compute scores in float16, in which most products of two such averages underflow to zero.
    _importance("scores_in_float16", ["outputs"],
        "return I_bar * U_bar", "return (I_bar.half() * U_bar.half()).float()", dtype="float16"),
]
# fmt: on
