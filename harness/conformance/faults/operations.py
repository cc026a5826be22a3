"""Faults of the Operations."""

from __future__ import annotations

from harness.conformance.faults import planted
from harness.conformance.faults.patched_copy import PatchedCopy

_TIES = {"shape": [8, 64], "block": 64, "kind": "ties"}
_PLAIN = {"shape": [5, 96], "block": 64}
_LAYER = {"shape": [48, 128], "rows": [9]}
_STEP = {"shape": [64, 80], "weight_decay": 0.1}
_GALORE = {"shape": [8, 24], "rank": 8, "weight_decay": 0.1, "eps": 0.1}
_GALORE_8 = {"shape": [48, 96], "rank": 4, "weight_decay": 0.1}
_BATCH = {"ids": [1, 0, -1, 1], "ranks": [3, 16], "shape": [63, 48]}
_SEARCH = "codes = torch.bucketize(scaled, midpoints)"
_HIGH_FIRST = "return padded[0::2] << 4 | padded[1::2]"
_LOW_FIRST = "return padded[1::2] << 4 | padded[0::2]"


@planted("nf4_quantize", "outputs", values=_TIES)
def takes_the_upper_code_at_a_tie(its: PatchedCopy) -> None:
    """Compare with `>=` instead of `>` at a midpoint."""
    its.line(_SEARCH, "codes = torch.bucketize(scaled, midpoints, right=True)", file="dynamic_map")


@planted("nf4_quantize", "outputs", values=_PLAIN)
def packs_the_first_code_low(its: PatchedCopy) -> None:
    its.line(_HIGH_FIRST, _LOW_FIRST, file="nf4")


@planted("nf4_quantize", "outputs", values=_PLAIN)
def begins_a_block_with_every_row(its: PatchedCopy) -> None:
    its.line("flat = x.detach().flatten().float()", "flat = x.detach().T.flatten().float()", file="dynamic_map")


@planted("nf4_quantize", "outputs", values={"shape": [63, 65], "block": 64})
def fills_up_an_odd_length_before_its_end(its: PatchedCopy) -> None:
    its.line("(0, codes.numel() % 2), value=fill", "(codes.numel() % 2, 0), value=fill", file="nf4")


@planted("nf4_quantize", "outputs", values={"shape": [6, 64], "block": 64, "kind": "zero-blocks"})
def decodes_a_block_of_zeros_to_something(its: PatchedCopy) -> None:
    """Use the largest code with an absmax of 1; code 7 with any absmax, or any code with an absmax of 0, would be right."""
    its.line(
        "torch.where(absmax[:, None] == 0, torch.zeros_like",
        "torch.where(absmax[:, None] == 0, torch.ones_like",
        file="dynamic_map",
    )
    its.line(
        "    midpoints =", "    absmax = torch.where(absmax == 0, 1.0, absmax)\n    midpoints =", file="dynamic_map"
    )


@planted("nf4_quantize", "arguments", values=_PLAIN)
def scales_its_argument_in_place(its: PatchedCopy) -> None:
    its.line(
        "flat = x.detach().flatten().float()", "flat = x.detach().mul_(2).flatten().float() / 2", file="dynamic_map"
    )


@planted("nf4_dequantize", "outputs", values={"shape": [63, 66], "block": 64})
def decodes_the_low_nibble_first(its: PatchedCopy) -> None:
    its.line(
        "return code.to(codes.device)[codes.flatten().long()] * scale",
        "return code.to(codes.device)[codes.flatten().long().view(-1, 2).flip(1).flatten()] * scale",
        file="dynamic_map",
    )


@planted("nf4_dequantize", "outputs", values={"shape": [160, 96], "block": 64})
def scales_by_the_block_before(its: PatchedCopy) -> None:
    its.line("scale = absmax.float()", "scale = absmax.float().roll(1)", file="dynamic_map")


@planted("nf4_dequantize", "written", values={"shape": [160, 96], "block": 64})
def leaves_the_last_element_as_it_found_it(its: PatchedCopy) -> None:
    its.line(
        "return code.to(codes.device)[codes.flatten().long()] * scale",
        "values = code.to(codes.device)[codes.flatten().long()] * scale; out = torch.empty_like(values); "
        "out[:-1] = values[:-1]; return out",
        file="dynamic_map",
    )


@planted("fp4_quantize", "outputs", values=_PLAIN)
def drops_the_sign(its: PatchedCopy) -> None:
    its.line("negative = (flat < 0)", "negative = (flat < -torch.inf)", file="fp4")


@planted("fp4_dequantize", "outputs", values=_PLAIN | {"shape": [4, 96]})
def has_no_subnormal(its: PatchedCopy) -> None:
    its.line("torch.where(E == 0, m / 16,", "torch.where(E == 0, m * 0,", file="fp4")


@planted("nf4_linear", "backward", values=_LAYER)
def stops_the_gradient_in_the_layer(its: PatchedCopy) -> None:
    its.line("return linear(x, _FORM", "return linear(x.detach() + 0 * x, _FORM")


@planted("nf4_linear", "outputs", values=_LAYER)
def forgets_the_bias(its: PatchedCopy) -> None:
    its.line("x.dtype), bias)", "x.dtype), None)")


@planted("nf4_linear", "outputs", values={**_LAYER, "training": False})
def evaluates_in_bfloat16(its: PatchedCopy) -> None:
    its.line("return linear(x, ", "x = x if training else x.bfloat16().to(x.dtype)\n    return linear(x, ")


@planted("nf4_linear", "outputs", values=_LAYER, dtype="bfloat16")
def answers_in_float64(its: PatchedCopy) -> None:
    """Return the right values in a dtype that the next layer rejects."""
    its.line("x.dtype), bias)", "x.dtype), bias).double()")


@planted("nf4_linear", "repeatable", values=_LAYER)
def sums_in_another_order_each_time(its: PatchedCopy) -> None:
    its.line("x.dtype), bias)", "x.dtype), bias) * (1 + torch.finfo(x.dtype).eps * (torch.rand(()) * 4).round())")


@planted("double_quantize", "outputs", values={"blocks": 257})
def does_not_subtract_the_mean(its: PatchedCopy) -> None:
    its.line("quantize_blockwise(flat - offset,", "quantize_blockwise(flat,", file="double_quant")


@planted("double_dequantize", "outputs", values={"blocks": 257})
def does_not_add_the_mean(its: PatchedCopy) -> None:
    its.line(" + offset.float()", "", file="double_quant")


@planted("dynamic_quantize", "outputs", values={"numel": 1024})
def cuts_where_it_should_round(its: PatchedCopy) -> None:
    its.line("((code[:-1] + code[1:]) / 2)", "code[1:]", file="dynamic_map")


@planted("adamw8bit_step", "outputs", values=_STEP)
def adds_the_decay_to_the_gradient(its: PatchedCopy) -> None:
    """Compute Adam with L2 regularisation, which is not AdamW."""
    its.line("wide *= 1 - lr * weight_decay", "wide *= 1", file="adamw8bit")
    its.line(
        "g = p.to(dtype, copy=True), g.to(dtype)",
        "g = p.to(dtype, copy=True), g.to(dtype) + weight_decay * p",
        file="adamw8bit",
    )


@planted("adamw8bit_step", "outputs", values=_STEP)
def counts_its_steps_from_zero(its: PatchedCopy) -> None:
    its.line(
        "    dtype = working_dtype(p.dtype)\n    wide",
        "    step -= 1\n    dtype = working_dtype(p.dtype)\n    wide",
        file="adamw8bit",
    )


@planted("adamw8bit_step", "output_codes", values=_STEP)
def keeps_signed_codes_of_the_second_moment(its: PatchedCopy) -> None:
    its.line('("v", v, False)', '("v", v, True)', file="adamw8bit")


@planted("galore_step", "outputs", values=_GALORE)
def projects_on_the_other_side(its: PatchedCopy) -> None:
    its.line("R = G if basis.P is None else basis.P.T @ G", "R = G if basis.P is None else basis.P @ G", file="galore")


@planted("galore_step", "outputs", values=_GALORE)
def adds_eps_under_the_root(its: PatchedCopy) -> None:
    its.line("M / (V.sqrt() + eps)", "M / (V + eps).sqrt()", file="galore")


@planted("galore_step", "outputs", values=_GALORE)
def scales_the_decay_as_well(its: PatchedCopy) -> None:
    its.line("W.mul_(1 - lr * weight_decay)", "W.mul_(1 - lr * scale * weight_decay)", file="galore")


@planted("galore8bit_step", "outputs", values=_GALORE_8)
def moves_by_the_narrowed_moments(its: PatchedCopy) -> None:
    its.line(
        "    N: Tensor = correction",
        "    galore_moments.encode(state, M, V)\n    M, V = galore_moments.decode(state, R)\n    N: Tensor = correction",
        file="galore",
    )


@planted("galore8bit_step", "output_codes", values=_GALORE_8)
def keeps_signed_codes_of_a_projected_second_moment(its: PatchedCopy) -> None:
    its.line('"V": False', '"V": True', file="galore_moments")


@planted("galore8bit_step", "output_codes", values=_GALORE_8)
def never_narrows_its_moments(its: PatchedCopy) -> None:
    its.line("    galore_moments.encode(state, M, V)\n", "", file="galore")


@planted("multi_lora_linear", "outputs", values=_BATCH)
def gives_all_the_first_adapter(its: PatchedCopy) -> None:
    its.line("rows = (chosen == i)", "rows = (chosen.clamp(max=0) == i)", file="multi_lora")


@planted("multi_lora_linear", "outputs", values=_BATCH)
def adapts_who_has_no_adapter(its: PatchedCopy) -> None:
    its.line("rows = (chosen == i)", "rows = (chosen.clamp(min=0) == i)", file="multi_lora")


@planted("multi_lora_linear", "outputs", "backward", values=_BATCH)
def scales_all_alike(its: PatchedCopy) -> None:
    its.line("update = scaling * (", "update = scalings[0] * (", file="multi_lora")


@planted("paged_adamw", "outputs", values={"sizes": [1000, 100000]})
def loses_what_it_pages(its: PatchedCopy) -> None:
    its.line(
        "return torch.empty(page.shape, dtype=page.dtype, device=device).copy_(page)",
        "return torch.zeros(page.shape, dtype=page.dtype, device=device)",
        file="paged",
    )


@planted("paged_states", "outputs", values={"sizes": [1000, 99999, 100000, 200000]})
def pages_everything(its: PatchedCopy) -> None:
    its.line("isinstance(t, Tensor) and is_paged(t.numel())", "isinstance(t, Tensor) and t.numel() > 1", file="paged")


@planted("multi_lora_linear", "layouts", values=_BATCH)
def reads_a_matrix_as_if_it_were_contiguous(its: PatchedCopy) -> None:
    its.line("(x[rows] @ A.T @ B.T)", "(x[rows] @ A.as_strided(A.shape, (A.shape[1], 1)).T @ B.T)", file="multi_lora")


@planted("nf4_dequantize", "layouts", values={"shape": [160, 96], "block": 64})
def reads_constants_as_if_they_were_contiguous(its: PatchedCopy) -> None:
    its.line("scale = absmax.float()", "scale = absmax.as_strided(absmax.shape, (1,)).float()", file="dynamic_map")


@planted("nf4_linear", "written", values=_LAYER)
def adds_a_buffer_that_nobody_wrote(its: PatchedCopy) -> None:
    """Add zeros, or NaN if torch fills fresh memory with NaN, like a buffer that is never written."""
    its.line(
        "return linear(x, ", "x = x + torch.where((e := torch.empty_like(x)).isnan(), e, 0.0)\n    return linear(x, "
    )


@planted("double_quantize", "written", values={"blocks": 257})
def leaves_its_codes_unwritten(its: PatchedCopy) -> None:
    """Return the right codes, or the largest integers if torch fills fresh memory with them."""
    its.line(
        "return codes, constants, offset",
        "fresh = torch.empty_like(codes)\n    return torch.where(fresh.min() == 255, fresh, codes), constants, offset",
        file="double_quant",
    )


@planted("adamw8bit_step", "arguments", values=_STEP)
def moves_the_parameter_it_was_given(its: PatchedCopy) -> None:
    its.line("    p = p.clone()\n", "")


@planted("galore_step", "arguments", values=_GALORE)
def moves_the_weight_it_was_given(its: PatchedCopy) -> None:
    its.line("    W = W.clone()\n", "")


@planted("multi_lora_linear", "repeatable", values=_BATCH)
def rounds_at_random(its: PatchedCopy) -> None:
    its.line(
        "return multi_lora.multi_lora_linear(x, linear(x, W), As, Bs, scalings, ids)",
        "y = multi_lora.multi_lora_linear(x, linear(x, W), As, Bs, scalings, ids)\n"
        "    return y * (1 + torch.finfo(y.dtype).eps * (torch.rand_like(y) < 0.5))",
    )
