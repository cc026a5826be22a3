"""Faults of the adapted linear layers as Operations, and of AdaLoRA's scores."""

from __future__ import annotations

from harness.conformance.faults import planted
from harness.conformance.faults.patched_copy import PatchedCopy

_PLAIN = {"shape": [24, 40], "rows": [9], "rank": 3}
_DROP = {**_PLAIN, "dropout": 0.25}
_PACKED = {"shape": [48, 65], "rows": [9], "rank": 3, "dropout": 0.25}
_SQUARE = {"shape": [24, 24], "rows": [9], "rank": 24}
_SCORED = {"shape": [24, 40], "rank": 3}

_LORA_DOWN = "h_TR = self.dropout(x_TD) @ self.A.T"
_LORA_SUM = "self.base(x_TD) + self.scaling * (h_TR @ self.B.T)"
_NORM = "norms(self.direction(W0_ED), self.per)\n        g = gain"
_DORA_SUM = "(g - 1) * (dropped_TD @ W0_ED.T) + g * self.scaling * (dropped_TD @ self.A.T @ self.B.T)"


@planted("lora_linear", "outputs", "backward", values=_PLAIN)
def leaves_the_scaling_out(its: PatchedCopy) -> None:
    its.line(_LORA_SUM, "self.base(x_TD) + h_TR @ self.B.T", file="lora")


@planted("lora_linear", "outputs", "backward", values=_DROP)
def drops_from_the_base_too(its: PatchedCopy) -> None:
    its.line(_LORA_SUM, "self.base(self.dropout(x_TD)) + self.scaling * (h_TR @ self.B.T)", file="lora")


@planted("lora_linear", "outputs", "backward", values=_DROP)
def drops_without_making_up_for_it(its: PatchedCopy) -> None:
    """Use the mask as if its values were 0 and 1."""
    its.line(_LORA_DOWN, "h_TR = (x_TD * (self.dropout.mask != 0)) @ self.A.T", file="lora")


@planted("lora_linear", "outputs", "backward", values=_DROP)
def looks_at_no_mask(its: PatchedCopy) -> None:
    its.line(_LORA_DOWN, "h_TR = x_TD @ self.A.T", file="lora")


@planted("lora_linear", "backward", values=_DROP)
def forgets_the_mask_in_the_backward_pass(its: PatchedCopy) -> None:
    """Compute the right output, but the gradient of x through the update without dropout."""
    its.line(_LORA_DOWN, "h_TR = (x_TD + (self.dropout(x_TD) - x_TD).detach()) @ self.A.T", file="lora")


@planted("lora_linear", "backward", values=_PLAIN)
def scales_forward_only(its: PatchedCopy) -> None:
    its.line(_LORA_SUM, "self.base(x_TD) + (u := h_TR @ self.B.T) + (self.scaling - 1) * u.detach()", file="lora")


@planted("lora_linear", "outputs", values=_PLAIN)
def forgets_the_bias_of_the_layer(its: PatchedCopy) -> None:
    its.line("apply_layer(lora.LoraLinear(dense_linear(W, bias),", "apply_layer(lora.LoraLinear(dense_linear(W, None),")


@planted("nf4_lora_linear", "outputs", "backward", values=_PACKED)
def drops_from_the_packed_base_too(its: PatchedCopy) -> None:
    its.line(_LORA_SUM, "self.base(self.dropout(x_TD)) + self.scaling * (h_TR @ self.B.T)", file="lora")


@planted("nf4_lora_linear", "backward", values=_PACKED)
def passes_no_gradient_through_the_packed_weight(its: PatchedCopy) -> None:
    """Stop the gradient of x at the frozen weight."""
    its.line(_LORA_SUM, "self.base(x_TD).detach() + self.scaling * (h_TR @ self.B.T)", file="lora")


@planted("nf4_lora_linear", "outputs", values=_PACKED)
def begins_a_block_with_every_row_of_the_weight(its: PatchedCopy) -> None:
    its.line(
        "_FORM.dequantize(packed, absmax, block, shape, x.dtype)",
        "_FORM.dequantize(packed, absmax[: shape[0]].repeat_interleave(shape[1]), 1, shape, x.dtype)",
    )


@planted("nf4_lora_linear", "outputs", values={**_PACKED, "block": 128})
def takes_every_block_for_one_of_64(its: PatchedCopy) -> None:
    its.line(
        "_FORM.dequantize(packed, absmax, block, shape, x.dtype)",
        "_FORM.dequantize(packed, absmax.repeat(2), 64, shape, x.dtype)",
    )


@planted("nf4_lora_linear", "outputs", values={**_PACKED, "bias": True})
def forgets_the_bias_beside_the_packed_weight(its: PatchedCopy) -> None:
    its.line("shape, x.dtype), bias)", "shape, x.dtype), None)")


@planted("dora_linear", "backward", values=_PLAIN)
def sends_a_gradient_through_the_norm(its: PatchedCopy) -> None:
    """Follow the paper's eq. 6, but not section 4.3 and the authors' code."""
    its.line("norm.detach() if self.detach_norm else norm", "norm", file="dora")


@planted("dora_linear", "outputs", values=_SQUARE)
def takes_the_norm_of_columns(its: PatchedCopy) -> None:
    its.line("dim=1 if per", "dim=0 if per", file="dora")


@planted("dora_linear", "outputs", "backward", values=_PLAIN)
def divides_by_the_norm_of_the_base(its: PatchedCopy) -> None:
    its.line(_NORM, "norms(W0_ED, self.per)\n        g = gain", file="dora")


@planted("dora_linear", "outputs", "backward", values=_PLAIN)
def leaves_the_scaling_out_of_the_norm(its: PatchedCopy) -> None:
    its.line(_NORM, "norms(W0_ED + self.B @ self.A, self.per)\n        g = gain", file="dora")


@planted("dora_linear", "outputs", "backward", values=_DROP)
def drops_from_all_of_the_weight(its: PatchedCopy) -> None:
    """Compute g (V x) with dropout on all of x; without dropout the result is the same."""
    its.line("self.base(x_TD) + added_TE", "self.base(dropped_TD) + added_TE", file="dora")


@planted("dora_linear", "outputs", "backward", values=_DROP)
def drops_from_the_update_alone(its: PatchedCopy) -> None:
    """Apply dropout to the update only, as LoRA does."""
    its.line(_DORA_SUM, _DORA_SUM.replace("dropped_TD", "x_TD", 1), file="dora")


@planted("dora_linear", "outputs", values=_PLAIN)
def scales_the_bias_by_the_magnitude(its: PatchedCopy) -> None:
    its.line("self.base(x_TD) + added_TE", "self.base(x_TD) + added_TE + (g - 1) * self.base.bias", file="dora")


@planted("dora_linear", "outputs", "backward", values=_PLAIN)
def adds_the_update_without_its_magnitude(its: PatchedCopy) -> None:
    its.line(_DORA_SUM, _DORA_SUM.replace("g * self.scaling", "self.scaling"), file="dora")


@planted("dora_linear", "outputs", "backward", values={**_PLAIN, "kind": "zero-rows"})
def divides_zero_by_zero_in_a_layer(its: PatchedCopy) -> None:
    its.line("return torch.where(some, m, 0.0) / torch.where(some, norm, 1.0)", "return m / norm", file="dora")


@planted("dora_linear", "outputs", "backward", values={**_PLAIN, "kind": "cancelled"})
def makes_the_norm_of_products(its: PatchedCopy) -> None:
    """Compute ||W||^2 + 2 s <W, B A> + s^2 ||B A||^2: right on paper, but only as exact as its largest term."""
    its.line(
        _NORM,
        "s, A, B = self.scaling, self.A, self.B\n"
        "        cross, own = ((W0_ED @ A.T) * B).sum(1), ((B @ (A @ A.T)) * B).sum(1)\n"
        "        norm = (W0_ED.square().sum(1) + 2 * s * cross + s**2 * own).clamp(min=0).sqrt()\n"
        "        g = gain",
        file="dora",
    )


@planted("vera_linear", "outputs", "backward", values=_SQUARE)
def takes_b_for_d(its: PatchedCopy) -> None:
    its.line("h_TR = self.d *", "h_TR = self.b *", file="vera")
    its.line("+ self.b * (h_TR @", "+ self.d * (h_TR @", file="vera")


@planted("vera_linear", "outputs", "backward", values=_PLAIN)
def leaves_d_out(its: PatchedCopy) -> None:
    its.line("h_TR = self.d * (self.dropout(x_TD) @ self.A.T)", "h_TR = self.dropout(x_TD) @ self.A.T", file="vera")


@planted("vera_linear", "outputs", "backward", values=_PLAIN)
def scales_the_base_by_b_too(its: PatchedCopy) -> None:
    its.line(
        "self.base(x_TD) + self.b * (h_TR @ self.B.T)", "self.b * (self.base(x_TD) + h_TR @ self.B.T)", file="vera"
    )


@planted("vera_linear", "outputs", "backward", values=_DROP)
def drops_from_the_base_of_vera(its: PatchedCopy) -> None:
    its.line("self.base(x_TD) + self.b", "self.base(self.dropout(x_TD)) + self.b", file="vera")


@planted("vera_linear", "outputs", "backward", values=_DROP)
def drops_behind_the_first_projection(its: PatchedCopy) -> None:
    """Apply the first R columns of the mask to the output of A."""
    its.line(
        "self.d * (self.dropout(x_TD) @ self.A.T)",
        "self.d * self.dropout.mask[..., : len(self.d)] * (x_TD @ self.A.T)",
        file="vera",
    )


@planted("vera_linear", "backward", values=_PLAIN)
def trains_b_alone(its: PatchedCopy) -> None:
    its.line("h_TR = self.d *", "h_TR = self.d.detach() *", file="vera")


@planted("adalora_importance", "outputs", values=_SCORED)
def swaps_the_two_betas(its: PatchedCopy) -> None:
    its.line("layer.observe(beta1, beta2)", "layer.observe(beta2, beta1)")


@planted("adalora_importance", "outputs", values=_SCORED)
def measures_uncertainty_by_the_average_of_before(its: PatchedCopy) -> None:
    its.line(
        "I_bar.copy_(smoothed(I_bar, I, beta1))",
        "old = I_bar.clone()\n            I_bar.copy_(smoothed(I_bar, I, beta1))",
        file="adalora",
    )
    its.line("uncertainty(U_bar, I, I_bar, beta2)", "uncertainty(U_bar, I, old, beta2)", file="adalora")


@planted("adalora_importance", "outputs", values=_SCORED)
def scores_a_triplet_by_its_least_weight(its: PatchedCopy) -> None:
    its.line("s_B.mean(dim=0) + s_A.mean(dim=1)", "s_B.amin(dim=0) + s_A.amin(dim=1)", file="adalora")


@planted("adalora_importance", "outputs", values=_SCORED)
def adds_up_where_it_should_average(its: PatchedCopy) -> None:
    its.line("s_B.mean(dim=0) + s_A.mean(dim=1)", "s_B.sum(dim=0) + s_A.sum(dim=1)", file="adalora")


@planted("adalora_importance", "outputs", values={"shape": [24, 24], "rank": 24})
def averages_over_the_other_axis(its: PatchedCopy) -> None:
    its.line("s_B.mean(dim=0) + s_A.mean(dim=1)", "s_B.mean(dim=1) + s_A.mean(dim=0)", file="adalora")


@planted("adalora_importance", "outputs", values=_SCORED)
def scores_by_sensitivity_alone(its: PatchedCopy) -> None:
    its.line("return I_bar * U_bar", "return I_bar", file="adalora")


@planted("adalora_importance", "outputs", values=_SCORED)
def keeps_the_sign_of_a_sensitivity(its: PatchedCopy) -> None:
    its.line("return (w * grad).abs()", "return w * grad", file="adalora")


@planted("adalora_importance", "outputs", values=_SCORED, dtype="bfloat16")
def multiplies_in_the_weights_own_precision(its: PatchedCopy) -> None:
    its.line(
        "sensitivity(w.to(I_bar.dtype), grad.to(I_bar.dtype))", "sensitivity(w, grad).to(I_bar.dtype)", file="adalora"
    )


@planted("adalora_importance", "arguments", values=_SCORED)
def moves_the_averages_it_was_given(its: PatchedCopy) -> None:
    its.line(
        "    return (*averages, layer.scores())",
        "    given['I_A'].copy_(averages[0])\n    return (*averages, layer.scores())",
    )


@planted("adalora_importance", "outputs", values=_SCORED, dtype="float16")
def scores_in_float16(its: PatchedCopy) -> None:
    """Compute scores in float16, where most products of two such averages are zero."""
    its.line("return I_bar * U_bar", "return (I_bar.half() * U_bar.half()).float()", file="adalora")
