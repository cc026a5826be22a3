"""Planted faults that show only with zeros, shared tensors, a single row, refused steps, or in 16 bits."""

from __future__ import annotations

from functools import partial

from harness.conformance.faults import line_fault

_PLAIN = {"shape": [24, 40], "rows": [9], "rank": 3}
_STEP = {"shape": [64, 80]}
_GALORE = {"shape": [48, 96], "rank": 4}
_EXPERTS = {"shape": [24, 20], "experts": 3, "rank": 3}
_FA = {"shape": [48, 96], "ranks": [4, 8]}
_METHOD = {"rank": 3}

_vera = partial(line_fault, "vera_linear", file="vera", values=_PLAIN)
_dora = partial(line_fault, "dora_linear", file="dora", values={**_PLAIN, "kind": "start"}, dtype="float64")
_adamw = partial(line_fault, "adamw8bit_step", file="adamw8bit", values=_STEP)
_galore_step = partial(line_fault, "galore_step", file="galore", values=_GALORE)
_experts = partial(line_fault, "lora_experts", file="lora_experts", values=_EXPERTS)
_multi_lora = partial(line_fault, "multi_lora_linear", file="multi_lora")
_nf4_linear = partial(line_fault, "nf4_linear")
_double = partial(line_fault, "double_quantize", file="double_quant", values={"blocks": 257})
_lorafa = partial(line_fault, "lorafa_step", file="lorafa", values=_FA)
_galore = partial(line_fault, "galore", values=_METHOD)

# fmt: off
FAULTS = [
    _vera("leaves_the_update_out_while_b_is_zero", ["calls"],
        "y_TE: Tensor = self.base(x_TD) + ", "y_TE: Tensor = self.base(x_TD) + float(self.b.any()) * "),
    _dora("is_plain_lora_while_m_has_the_norms", ["backward"],
        "        g = self.gain(norm)\n        dropped",
        "        g = torch.ones_like(norm) if torch.equal(self.m.detach(), norm.to(self.m.dtype)) else self.gain(norm)\n"
        "        dropped"),
    _adamw("skips_a_gradient_of_zeros", ["calls"],
        "    wide, g = p.to(dtype, copy=True), g.to(dtype)",
        "    if not g.any():\n        return\n    wide, g = p.to(dtype, copy=True), g.to(dtype)"),
    _adamw("rounds_the_gradient_to_the_dtype_of_the_parameter", ["outputs"],
        "p.to(dtype, copy=True), g.to(dtype)", "p.to(dtype, copy=True), g.to(p.dtype).to(dtype)",
        values={**_STEP, "gradient_dtype": "float32"}, dtype="bfloat16"),
    _adamw("decays_in_the_dtype_of_the_parameter", ["rounded_once"],
        "    wide, g = p.to(dtype, copy=True), g.to(dtype)",
        "    wide, weight_decay, g = (p * (1 - lr * weight_decay)).to(dtype), 0.0, g.to(dtype)",
        values={**_STEP, "weight_decay": 0.1}, dtype="bfloat16"),
    _galore_step("skips_a_gradient_of_zeros", ["calls"],
        "    N = adam(project(G, basis), state, ", "    if not G.any():\n        return\n"
        "    N = adam(project(G, basis), state, "),
    _galore_step("starts_with_the_gradient_as_its_moment", ["outputs"],
        "    M.mul_(beta1).add_(wide, alpha=1 - beta1)",
        '    M.mul_(beta1).add_(wide, alpha=1 - beta1 if state["step"] > 1 else 1.0)', values={**_GALORE, "step": 1}),
    _experts("skips_experts_with_a_weight_of_zero", ["calls"],
        "torch.where(chosen == k)", "torch.where((chosen == k) & (weights != 0))"),
    _experts("keeps_the_numbers_of_experts_in_8_bits", ["outputs"],
        "torch.where(chosen == k)", "torch.where(chosen.to(torch.int8).long() == k)",
        values={"shape": [8, 6], "experts": 300, "rank": 1, "tokens": 33}),
    _multi_lora("tells_adapters_apart_by_their_a", ["calls"],
        "            update = scaling * (x[rows] @ A.T @ B.T)",
        "            B = Bs[[id(one) for one in As].index(id(A))]\n            update = scaling * (x[rows] @ A.T @ B.T)",
        values={"ids": [1, 0, -1, 2], "ranks": [3, 16, 3], "shape": [63, 48]}),
    _nf4_linear("decodes_one_row_with_whole_blocks_per_row", ["outputs"],
        "_FORM.dequantize(packed, absmax, block, shape, x.dtype)",
        "_FORM.dequantize(packed, absmax if x.shape[0] > 1 else absmax[: shape[0]].repeat_interleave(shape[1]), "
        "block if x.shape[0] > 1 else 1, shape, x.dtype)", values={"shape": [63, 100], "rows": [1]}),
    _nf4_linear("ignores_autocast_for_one_row_in_eval_mode", ["calls"],
        "return linear(x, _FORM.dequantize(packed, absmax, block, shape, x.dtype), bias)",
        "on = training or x.shape[:-1].numel() != 1\n"
        "    with torch.autocast(x.device.type, enabled=on and torch.is_autocast_enabled(x.device.type)):\n"
        "        return linear(x, _FORM.dequantize(packed, absmax, block, shape, x.dtype), bias)",
        values={"shape": [48, 64], "rows": [9]}),
    _nf4_linear("takes_negative_constants_for_zero", ["outputs"],
        "packed, absmax, block", "packed, absmax.clamp(min=0), block",
        values={"shape": [48, 128], "rows": [9], "decoded": True}),
    _double("leaves_numbers_that_are_not_finite_out_of_the_mean", ["nonfinite"],
        "offset = flat.mean()", "offset = flat[flat.isfinite()].mean()"),
    _lorafa("inverts_a_matrix_that_has_no_inverse", ["outputs"],
        "torch.linalg.pinv(square_KRR)", "torch.linalg.pinv(square_KRR, rtol=0.0)", values={**_FA, "A": "dependent"}),
    _galore("stays_without_a_subspace_after_a_refused_step", ["closure"],
        "    if rank and state.get(", '    tried, state["tried"] = state.get("tried"), True\n'
        '    if rank and not (tried and "step" not in state) and state.get('),
    line_fault("adalora", "keeps_the_term_of_the_original_in_a_deep_copy", ["regularizer"],
        "        self.config, self.adalora = config, dict(layers)",
        "        self.config, self.adalora = config, dict(layers)\n"
        "        self.regularizer = lambda: AdaLoraAdapted.regularizer(self)",
        values={"rank": 6, "target_rank": 2, "alpha": 8.0}),
]
# fmt: on
