"""Planted faults of the Operations."""

from __future__ import annotations

from functools import partial

from harness.conformance.faults import line_fault

_TIES = {"shape": [8, 64], "block": 64, "kind": "ties"}
_PLAIN = {"shape": [5, 96], "block": 64}
_LAYER = {"shape": [48, 128], "rows": [9]}
_STEP = {"shape": [64, 80], "weight_decay": 0.1}
_GALORE = {"shape": [8, 24], "rank": 8, "weight_decay": 0.1, "eps": 0.1}
_GALORE_8 = {"shape": [48, 96], "rank": 4, "weight_decay": 0.1}
_BATCH = {"ids": [1, 0, -1, 1], "ranks": [3, 16], "shape": [63, 48]}
_PADDED = {"ids": [1, 0, -1, 1], "ranks": [3, 16], "shape": [24, 20], "tokens": 5}
_ADDED = "            y = y.index_add(0, rows, update.to(y.dtype))"
_SEARCH = "codes = torch.bucketize(scaled, midpoints)"
_HIGH_FIRST = "return padded[0::2] << 4 | padded[1::2]"
_LOW_FIRST = "return padded[1::2] << 4 | padded[0::2]"

_quantize = partial(line_fault, "nf4_quantize", file="dynamic_map", values=_PLAIN)
_dequantize = partial(line_fault, "nf4_dequantize", file="dynamic_map", values={"shape": [160, 96], "block": 64})
_nf4_linear = partial(line_fault, "nf4_linear", values=_LAYER)
_double_quantize = partial(line_fault, "double_quantize", file="double_quant", values={"blocks": 257})
_adamw = partial(line_fault, "adamw8bit_step", file="adamw8bit", values=_STEP)
_galore = partial(line_fault, "galore_step", file="galore", values=_GALORE)
_galore_8 = partial(line_fault, "galore8bit_step", file="galore", values=_GALORE_8)
_multi_lora = partial(line_fault, "multi_lora_linear", file="multi_lora", values=_BATCH)

# fmt: off
FAULTS = [
    # Compare with `>=` instead of `>` at a midpoint.
    _quantize("takes_the_upper_code_at_a_tie", ["outputs"],
        _SEARCH, "codes = torch.bucketize(scaled, midpoints, right=True)", values=_TIES),
    _quantize("packs_the_first_code_low", ["outputs"], _HIGH_FIRST, _LOW_FIRST, file="nf4"),
    _quantize("starts_a_block_at_every_row", ["outputs"],
        "flat = x.detach().flatten().float()", "flat = x.detach().T.flatten().float()"),
    _quantize("pads_an_odd_length_at_its_start", ["outputs"],
        "(0, codes.numel() % 2), value=fill", "(codes.numel() % 2, 0), value=fill",
        file="nf4", values={"shape": [63, 65], "block": 64}),
    # Use the largest code with an absmax of 1. Correct would be code 7 with any absmax, or any code with an absmax of 0.
    _quantize("decodes_a_block_of_zeros_to_ones", ["outputs"],
        "torch.where(absmax[:, None] == 0, torch.zeros_like", "torch.where(absmax[:, None] == 0, torch.ones_like",
        "    midpoints =", "    absmax = torch.where(absmax == 0, 1.0, absmax)\n    midpoints =",
        values={"shape": [6, 64], "block": 64, "kind": "zero-blocks"}),
    _quantize("keeps_midpoints_in_the_default_dtype_of_the_first_call", ["first_call"],
        "midpoints = ((code[:-1] + code[1:]) / 2).to(x.device)",
        "midpoints = globals().setdefault('_kept', ((code[:-1] + code[1:]) / 2).to(torch.get_default_dtype())).float()"),
    _quantize("scales_its_argument_in_place", ["arguments"],
        "flat = x.detach().flatten().float()", "flat = x.detach().mul_(2).flatten().float() / 2"),
    # bitsandbytes#1721: in large blocks, the second byte of a thread keeps the bits of the first.
    _quantize("does_not_clear_a_byte_before_packing_the_next", ["outputs"],
        "return quantize_blockwise(W, codebook(), block)",
        "globals().update(_large=block > 512)\n    return quantize_blockwise(W, codebook(), block)",
        _HIGH_FIRST, "packed = padded[0::2] << 4 | padded[1::2]\n"
        "    if _large:\n        packed[1::2] |= packed[: len(packed) // 2 * 2 : 2]\n    return packed",
        file="nf4", values={"shape": [10, 333], "block": 1024}),
    line_fault("nf4_quantize", "fills_up_the_last_byte_with_a_code_of_minus_one", ["outputs"],
        "return pack_pairs(codes, fill=7)", "return pack_pairs(codes, fill=0)", file="nf4",
        values={"shape": [63, 65], "block": 64}),
    _dequantize("decodes_the_low_nibble_first", ["outputs"],
        "return code.to(codes.device)[codes.flatten().long()] * scale",
        "return code.to(codes.device)[codes.flatten().long().view(-1, 2).flip(1).flatten()] * scale",
        values={"shape": [63, 66], "block": 64}),
    # axolotl#3799: the kernel for bfloat16 writes into a buffer of float32.
    _dequantize("writes_bfloat16_into_a_float32_buffer", ["outputs"],
        "return code.to(codes.device)[codes.flatten().long()] * scale",
        "half = (code.to(codes.device)[codes.flatten().long()] * scale).bfloat16()\n"
        "    return torch.cat([half, torch.zeros_like(half)]).view(torch.float32)"),
    _dequantize("scales_by_the_previous_block", ["outputs"],
        "scale = absmax.float()", "scale = absmax.float().roll(1)"),
    _dequantize("leaves_the_last_element_unwritten", ["written"],
        "return code.to(codes.device)[codes.flatten().long()] * scale",
        "values = code.to(codes.device)[codes.flatten().long()] * scale; out = torch.empty_like(values); "
        "out[:-1] = values[:-1]; return out"),
    _dequantize("rounds_the_levels_to_16_bits", ["rounded_once"],
        "return code.to(codes.device)[", "return code.to(codes.device).bfloat16().float()[", dtype="bfloat16"),
    _dequantize("rounds_the_constants_to_16_bits", ["rounded_once"],
        "scale = absmax.float()", "scale = absmax.half().float()", dtype="float16"),
    _dequantize("truncates_the_product", ["rounded_once"],
        "return code.to(codes.device)[codes.flatten().long()] * scale",
        "y = code.to(codes.device)[codes.flatten().long()] * scale; "
        "return (y.view(torch.int32) & -65536).view(torch.float32)",
        dtype="bfloat16"),
    line_fault("fp4_quantize", "drops_the_sign", ["outputs"],
        "negative = (flat < 0)", "negative = (flat < -torch.inf)", file="fp4", values=_PLAIN),
    line_fault("fp4_dequantize", "has_no_subnormal", ["outputs"],
        "torch.where(E == 0, m / 16,", "torch.where(E == 0, m * 0,", file="fp4", values=_PLAIN | {"shape": [4, 96]}),
    # bitsandbytes#2026
    line_fault("fp4_dequantize", "cuts_off_digits_of_its_smallest_level", ["rounded_once"],
        "torch.where(E == 0, m / 16,", "torch.where(E == 0, m * 12 * 0.00520833,", file="fp4",
        values=_PLAIN | {"shape": [4, 96]}),
    # bitsandbytes#2087: the fused product is wrong, and decoding is right.
    _nf4_linear("multiplies_by_the_weights_of_another_row", ["outputs", "backward"],
        "shape, x.dtype), bias)", "shape, x.dtype).roll(1, 0), bias)"),
    _nf4_linear("stops_the_gradient_in_the_layer", ["backward"],
        "return linear(x, _FORM", "return linear(x.detach() + 0 * x, _FORM"),
    _nf4_linear("forgets_the_bias", ["outputs"], "x.dtype), bias)", "x.dtype), None)"),
    _nf4_linear("evaluates_in_bfloat16", ["outputs"],
        "return linear(x, ", "x = x if training else x.bfloat16().to(x.dtype)\n    return linear(x, ",
        values={**_LAYER, "training": False}),
    _nf4_linear("ignores_autocast_for_a_single_row", ["calls"],
        "    return linear(x, _FORM",
        "    off = torch.autocast(x.device.type, enabled=False)\n"
        "    with off if x.shape[:-1].numel() == 1 else torch.set_grad_enabled(torch.is_grad_enabled()):\n"
        "        return linear(x, _FORM"),
    # Return the right values in a dtype that the next layer rejects.
    _nf4_linear("returns_float64", ["outputs"], "x.dtype), bias)", "x.dtype), bias).double()", dtype="bfloat16"),
    _nf4_linear("sums_in_another_order_each_time", ["repeatable"],
        "x.dtype), bias)", "x.dtype), bias) * (1 + torch.finfo(x.dtype).eps * (torch.rand(()) * 4).round())"),
    _double_quantize("does_not_subtract_the_mean", ["outputs"],
        "quantize_blockwise(flat - offset,", "quantize_blockwise(flat,"),
    line_fault("double_dequantize", "ignores_the_size_of_the_second_blocks", ["outputs"],
        "dynamic_map(signed=True), block) + offset.float()", "dynamic_map(signed=True), BLOCK) + offset.float()",
        file="double_quant", values={"blocks": 1000, "spread": 0.05, "block": 128}),
    line_fault("double_dequantize", "counts_constants_in_16_bits", ["outputs"],
        "return dequantize_blockwise(c2, c1, dynamic_map(signed=True), block) + offset.float()",
        "at = (0 * c2.long() + 1).cumsum(0).sub(1).short().long() // block\n"
        "    return dynamic_map(signed=True)[c2.long()] * c1[at] + offset.float()",
        file="double_quant", values={"blocks": 40000}),
    line_fault("double_dequantize", "does_not_add_the_mean", ["outputs"],
        " + offset.float()", "", file="double_quant", values={"blocks": 257}),
    line_fault("dynamic_quantize", "truncates_instead_of_rounding", ["outputs"],
        "((code[:-1] + code[1:]) / 2)", "code[1:]", file="dynamic_map", values={"numel": 1024}),
    # Compute Adam with L2 regularisation, which is not AdamW.
    _adamw("adds_the_decay_to_the_gradient", ["outputs"], "wide *= 1 - lr * weight_decay", "wide *= 1",
        "g = p.to(dtype, copy=True), g.to(dtype)", "g = p.to(dtype, copy=True), g.to(dtype) + weight_decay * p"),
    _adamw("counts_its_steps_from_zero", ["outputs"],
        "    dtype = working_dtype(p.dtype)\n    wide", "    step -= 1\n    dtype = working_dtype(p.dtype)\n    wide"),
    _adamw("keeps_signed_codes_of_the_second_moment", ["output_codes"], '("v", v, False)', '("v", v, True)'),
    _galore("projects_on_the_other_side", ["outputs"],
        "R = G if basis.P is None else basis.P.T @ G", "R = G if basis.P is None else basis.P @ G"),
    _galore("adds_eps_under_the_root", ["outputs"], "M / (V.sqrt() + eps)", "M / (V + eps).sqrt()"),
    _galore("scales_the_decay_as_well", ["outputs"],
        "W.mul_(1 - lr * weight_decay)", "W.mul_(1 - lr * scale * weight_decay)"),
    _galore_8("moves_by_the_quantised_moments", ["outputs"], "    N: Tensor = correction",
        "    galore_moments.encode(state, M, V)\n    M, V = galore_moments.decode(state, R)\n    N: Tensor = correction"),
    _galore_8("keeps_signed_codes_of_the_second_moment", ["output_codes"],
        '"V": False', '"V": True', file="galore_moments"),
    _galore_8("never_stores_its_moments", ["output_codes"], "    galore_moments.encode(state, M, V)\n", ""),
    _multi_lora("applies_the_first_adapter_to_all_rows", ["outputs"],
        "rows = (chosen == i)", "rows = (chosen.clamp(max=0) == i)"),
    _multi_lora("gives_idle_adapters_gradients_of_zeros", ["backward"],
        "    y = base_out\n", "    y = base_out + sum(0 * t.sum().to(base_out.dtype) for t in (*As, *Bs))\n",
        values={**_BATCH, "ids": [1, -1, 1]}),
    _multi_lora("adapts_rows_without_an_adapter", ["outputs"],
        "rows = (chosen == i)", "rows = (chosen.clamp(min=0) == i)"),
    _multi_lora("scales_all_rows_by_the_first_scaling", ["outputs", "backward"],
        "update = scaling * (", "update = scalings[0] * ("),
    _multi_lora("counts_the_rows_that_are_not_zero_as_the_length", ["outputs", "backward"], _ADDED,
        "            length = x[rows].any(-1).sum(-1)[:, None]\n"
        "            update = update * (torch.arange(x.shape[1]) < length)[..., None]\n" + _ADDED,
        values={**_PADDED, "padding": "left"}),
    _multi_lora("takes_the_length_of_the_first_sequence_for_all", ["outputs", "backward"], _ADDED,
        "            update = update * (torch.arange(x.shape[1]) < x[0].any(-1).sum())[:, None]\n" + _ADDED,
        values={**_PADDED, "padding": "right"}),
    _multi_lora("skips_a_sequence_that_begins_with_padding", ["outputs", "backward"], _ADDED,
        "            update = update * x[rows, 0].any(-1)[:, None, None]\n" + _ADDED,
        values={**_PADDED, "padding": "left"}),
    _multi_lora("gives_no_gradient_to_padding", ["backward"], "    y = base_out\n",
        "    y, x = base_out, torch.where(x.any(-1, keepdim=True), x, x.detach())\n",
        values={**_PADDED, "padding": "right"}),
    _multi_lora("skips_rows_that_are_the_last_one", ["outputs", "backward"], _ADDED,
        "            update = update * (x[rows] != x[rows, -1:]).any(-1, keepdim=True)\n" + _ADDED,
        values={**_PADDED, "padding": "right-token"}),
    _multi_lora("skips_rows_that_are_the_first_one", ["outputs", "backward"], _ADDED,
        "            update = update * (x[rows] != x[rows, :1]).any(-1, keepdim=True)\n" + _ADDED,
        values={**_PADDED, "padding": "left-token"}),
    line_fault("paged_adamw", "pages_in_zeros", ["outputs"],
        "return torch.empty(page.shape, dtype=page.dtype, device=device).copy_(page)",
        "return torch.zeros(page.shape, dtype=page.dtype, device=device)",
        file="paged", values={"sizes": [1000, 100000]}),
    line_fault("paged_states", "pages_everything", ["outputs"],
        "isinstance(t, Tensor) and is_paged(t.numel())", "isinstance(t, Tensor) and t.numel() > 1",
        file="paged", values={"sizes": [1000, 99999, 100000, 200000]}),
    _multi_lora("reads_a_matrix_as_if_it_were_contiguous", ["layouts"],
        "(x[rows] @ A.T @ B.T)", "(x[rows] @ A.as_strided(A.shape, (A.shape[1], 1)).T @ B.T)"),
    _dequantize("reads_constants_as_if_they_were_contiguous", ["layouts"],
        "scale = absmax.float()", "scale = absmax.as_strided(absmax.shape, (1,)).float()"),
    # Add fresh memory that is zero unless torch fills it with NaN, as a buffer that is never written would be.
    _nf4_linear("adds_an_unwritten_buffer", ["written"],
        "return linear(x, ", "x = x + torch.where((e := torch.empty_like(x)).isnan(), e, 0.0)\n    return linear(x, "),
    # Return the right codes unless torch fills fresh memory with the largest integer; then return those integers.
    _double_quantize("leaves_its_codes_unwritten", ["written"],
        "from torch import Tensor", "import torch\nfrom torch import Tensor", "return codes, constants, offset",
        "fresh = torch.empty_like(codes)\n    return torch.where(fresh.min() == 255, fresh, codes), constants, offset"),
    _adamw("changes_its_parameter_in_place", ["arguments"], "    p = p.clone()\n", "", file=""),
    _galore("changes_its_weight_in_place", ["arguments"], "    W = W.clone()\n", "", file=""),
    _multi_lora("rounds_at_random", ["repeatable"],
        "return multi_lora.multi_lora_linear(x, linear(x, W), As, Bs, scalings, ids)",
        "y = multi_lora.multi_lora_linear(x, linear(x, W), As, Bs, scalings, ids)\n"
        "    return y * (1 + torch.finfo(y.dtype).eps * (torch.rand_like(y) < 0.5))",
        file=""),
]
# fmt: on
