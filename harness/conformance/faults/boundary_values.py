"""Planted faults that show only at a boundary value of a setting or a size, or in an unusual weight."""

from __future__ import annotations

from harness.conformance.faults import line_fault

_LORA = {"rank": 3, "alpha": 8.0}
_CONVOLVED = "    return _CONVOLVE[kernel.dim()](x, kernel, None, base.stride, padding, base.dilation, groups)"
_ADALORA = {"rank": 6, "target_rank": 2, "alpha": 8.0}

# fmt: off
FAULTS = [
    # Sizes and ranks.
    line_fault("dora_linear", "leaves_the_last_columns_out_of_the_norm_of_a_long_row", ["outputs", "backward"],
        'torch.linalg.vector_norm(V_ED, dim=1 if', "torch.linalg.vector_norm("
        "V_ED[:, : V_ED.shape[1] // 4096 * 4096] if V_ED.shape[1] > 4096 else V_ED, dim=1 if",
        file="dora", values={"shape": [3, 16400], "rows": [2], "rank": 2}),
    line_fault("dora", "reads_the_axis_of_the_magnitude_from_its_length", ["forward"],
        "norm = norms(self.direction(W0_ED), self.per)",
        'self.per = "output" if len(self.m) == len(self.B) else "input"\n'
        "        norm = norms(self.direction(W0_ED), self.per)",
        values={**_LORA, "per": "input"}, inputs=24, outputs=24),
    line_fault("dora", "squeezes_the_magnitude_of_one_output", ["parameters"],
        "norms(self.direction(dense_weight(base)), self.per).detach())",
        "norms(self.direction(dense_weight(base)), self.per).detach().squeeze())", outputs=1, values=_LORA),
    line_fault("pissa", "leaves_out_the_last_component_at_full_rank", ["principal"],
        "return U[:, :rank], S[:rank], Vt[:rank]",
        "S = torch.cat([S[:-1], S[-1:] * 0])\n    return U[:, :rank], S[:rank], Vt[:rank]",
        values={"rank": 24, "alpha": 8.0}),
    line_fault("galore", "does_not_project_at_full_rank", ["step"],
        "    basis = Projector(state.get", "    rank = rank if rank < min(W.shape) else 0\n    basis = Projector(state.get",
        values={"rank": 24, "eps": 0.1}),
    line_fault("vera", "draws_for_the_largest_layer_of_the_model", ["projections"],
        "(max(features_in_out(base)[side] for base in found.values()) for",
        "(max(features_in_out(m)[side] for m in model.modules() if isinstance(m, nn.Linear)) for",
        values={"rank": 3, "projection_key": 7}, model="wide"),
    line_fault("lora", "drops_nothing_with_rank_1", ["dropout"], "self.dropout(x_TD) @ self.A.T",
        "(self.dropout(x_TD) if len(self.A) > 1 else x_TD) @ self.A.T", values={**_LORA, "dropout": 0.25}),
    line_fault("lora", "drops_nothing_with_a_full_rank", ["dropout"], "self.dropout(x_TD) @ self.A.T",
        "(self.dropout(x_TD) if len(self.A) < min(self.base.weight.shape) else x_TD) @ self.A.T",
        values={**_LORA, "dropout": 0.25}),
    # Kernels, padding and experts.
    line_fault("lora", "pads_half_an_even_kernel_on_both_sides", ["forward", "gradient"], _CONVOLVED,
        '    if padding == "same":\n'
        "        half = [d * (k // 2) for d, k in zip(base.dilation, base.kernel_size)]\n"
        "        y = nn.functional.conv2d(x, kernel, None, base.stride, half, base.dilation, groups)\n"
        "        return y[..., : x.shape[-2], : x.shape[-1]]\n" + _CONVOLVED,
        file="lora_layers", values=_LORA, layer="conv2d-pointwise"),
    line_fault("lora", "adapts_only_experts_with_a_gate", ["parameters"], "in stacked_weights(base).items():",
        'in stacked_weights(base).items():\n        if name == "up_proj":\n            continue',
        file="lora_experts", values=_LORA, layer="experts", inputs=24, outputs=12),
    line_fault("lora_experts", "adds_an_expert_that_is_chosen_twice_once", ["outputs"],
        "y_TD = y_TD.index_add(0, token, out * weights[token, n, None])",
        "y_TD = y_TD.index_put((token,), y_TD[token] + out * weights[token, n, None])", file="lora_experts",
        values={"shape": [16, 12], "experts": 8, "rank": 2, "used": 1}),
    # Weights.
    line_fault("pissa", "computes_u_from_w_v_and_s", ["svd"],
        "(U * root).to(dtype)", "((W @ Vt.T) / S * root).to(dtype)", values=_LORA),
    line_fault("pissa", "samples_the_svd_of_a_large_weight", ["svd"],
        "    U, S, Vt = torch.linalg.svd(", "    if min(W_ED.shape) > 512:\n"
        "        U, S, Vt = torch.svd_lowrank(W_ED, rank + 8, 2)\n"
        "        return U[:, :rank], S[:rank], Vt.T[:rank]\n    U, S, Vt = torch.linalg.svd(", values=_LORA),
    line_fault("galore", "does_not_write_to_a_weight_stored_transposed", ["refresh"],
        "    if weight_decay:", "    W.copy_(W if W.is_contiguous() else before)\n    if weight_decay:",
        "    basis = Projector(state.get", "    before = W.clone()\n    basis = Projector(state.get",
        values={"rank": 3, "eps": 0.1}),
    line_fault("lora_qkv", "gives_a_shared_matrix_the_gradient_of_its_last_layer", ["backward"],
        "    return layer(0), layer(1), layer(2)",
        "    if As[0] is As[2]:\n        As = [As[0].detach(), As[1].detach(), As[2]]\n"
        "    return layer(0), layer(1), layer(2)",
        values={"shape": [24, 20], "rows": [5], "ranks": [2, 2, 2], "shared": True}),
    # Steps and schedules.
    line_fault("galore", "skips_a_gradient_of_zeros", ["optimizer"],
        "if p.grad is not None:", "if p.grad is not None and p.grad.any():", values={"rank": 3, "eps": 0.1}),
    line_fault("galore_step", "takes_the_bias_correction_as_1_after_1000_steps", ["outputs"],
        "    N: Tensor = correction", '    correction = 1.0 if state["step"] > 1000 else correction\n'
        "    N: Tensor = correction", file="galore", values={"shape": [96, 48], "rank": 4, "step": 5000}),
    line_fault("adamw8bit_step", "skips_a_step_without_a_learning_rate", ["output_codes"],
        "    p = p.clone()\n", "    if how['lr'] == 0:\n        return p, m, m_absmax, v, v_absmax\n    p = p.clone()\n",
        values={"shape": [300], "lr": 0.0}),
    line_fault("adalora", "prunes_only_at_the_end_without_a_warm_up", ["budget"],
        "if step == end or (config.tinit <", "if step == end or (0 < config.tinit <", values=_ADALORA),
    line_fault("adalora", "counts_the_cubes_of_its_budget_in_32_bits", ["budget"],
        "(end - step) ** 3 // (end - config.tinit) ** 3",
        "((end - step) ** 3 % 2**32) // ((end - config.tinit) ** 3 % 2**32)", values=_ADALORA),
    line_fault("adalora", "takes_a_beta_of_0_as_missing", ["importance"],
        "observe(self.config.beta1, self.config.beta2)", "observe(self.config.beta1 or 0.85, self.config.beta2 or 0.85)",
        values={**_ADALORA, "beta1": 0.0, "beta2": 0.0}),
    line_fault("multi_lora_linear", "gives_a_token_without_an_adapter_the_last_one", ["outputs"],
        "rows = (chosen == i)", "rows = ((chosen if x.shape[1] > 1 else chosen % len(As)) == i)",
        file="multi_lora", values={"ids": [-1, 1, 0, -1], "ranks": [2, 3], "shape": [24, 20], "tokens": 1}),
    line_fault("nf4_lora_linear", "drops_no_feature_of_a_single_row", ["outputs", "backward"],
        "dropout=0.0), x, mask,", "dropout=0.0), x, None if x.numel() == x.shape[-1] else mask,",
        values={"shape": [24, 64], "rows": [1], "rank": 3, "dropout": 0.5}),
    line_fault("qlora", "loses_the_last_code_of_an_odd_number", ["packing"],
        "padded = torch.nn.functional.pad(codes, (0, codes.numel() % 2), value=fill)",
        "padded = codes.clone()\n    if codes.numel() % 2:\n"
        "        padded = torch.nn.functional.pad(codes[:-1], (0, 2), value=fill)",
        file="nf4", values={"rank": 3, "alpha": 8.0}, inputs=63, outputs=65),
    line_fault("int8_linear", "takes_the_threshold_itself_for_no_outlier", ["outputs"],
        ".abs() >= threshold if", ".abs() > threshold if", file="int8",
        values={"shape": [24, 40], "rows": [9], "threshold": 6.0}),
    line_fault("adamw8bit_step", "stores_small_second_moments_too_small", ["output_codes"],
        "torch.zeros_like(blocks), blocks / absmax[:, None])",
        "torch.zeros_like(blocks), blocks / absmax.clamp(min=1e-8)[:, None])",
        file="dynamic_map", values={"shape": [600], "gradient": "small"}),
    line_fault("galore_step", "squares_in_the_gradients_dtype", ["outputs"],
        "V.mul_(beta2).addcmul_(wide, wide, value=1 - beta2)", "V.mul_(beta2).add_(R * R, alpha=1 - beta2)",
        file="galore", dtype="float16", values={"shape": [24, 40], "rank": 3, "gradient": "large"}),
    # Merging and saving.
    line_fault("adalora", "keeps_the_first_parameters_for_its_regularizer", ["save"],
        "orthogonality(list(self.adalora.values()), self.config.regularization)",
        "orthogonality(self.__dict__.setdefault('_kept', [type('Kept', (), {'A': one.A, 'B': one.B}) for one in "
        "self.adalora.values()]), self.config.regularization)",
        values={"rank": 4, "target_rank": 2, "alpha": 8.0}),
    line_fault("paged_states", "returns_one_tensor_for_all_calls", ["overlap"],
        "return torch.tensor([float(p in optimizer.where()) for p in trained], dtype=torch.float32, "
        "device=trained[0].device)",
        "found = torch.tensor([float(p in optimizer.where()) for p in trained])\n"
        "    return globals().setdefault('_kept', {}).setdefault(len(found), torch.empty_like(found)).copy_(found)",
        values={"sizes": [1000, 100000]}),
    line_fault("paged_states", "returns_numbers_of_the_default_dtype", ["calls"],
        "for p in trained], dtype=torch.float32, device", "for p in trained], device",
        values={"sizes": [1000, 100000]}),
    line_fault("qlora", "puts_a_layer_back_in_its_old_mode", ["merge"],
        "    module.train(model.get_submodule(path).training)\n", "", file="layers", values=_LORA),
    line_fault("lora", "leaves_new_layers_in_training_mode", ["eval_mode"],
        "    module.train(model.get_submodule(path).training)\n", "", file="layers", values={**_LORA, "dropout": 0.25}),
    line_fault("lora_int8", "leaves_the_absmax_out_of_the_state_dict", ["save"],
        'self.register_buffer("absmax", absmax)', 'self.register_buffer("absmax", absmax, persistent=False)',
        file="int8_weight", values=_LORA),
    line_fault("lora", "merges_into_the_table_of_an_embedding", ["merge"],
        "        dense: Any = self.dense_base()\n        with torch.no_grad():\n",
        "        dense: Any = self.dense_base()\n        with torch.no_grad():\n"
        '            if type(self.base).__name__ == "Embedding":\n'
        "                self.base.weight += as_stored(dense, self.delta()).to(dense.weight.dtype)\n",
        file="adapted", values=_LORA, layer="embedding"),
    # Sizes that are equal, and tensors of unusual sizes.
    line_fault("dora_linear", "reads_the_axis_of_the_gain_from_the_rows_of_x", ["outputs", "backward"],
        "    layer = dora.DoraLinear(", "    m = m.flip(0) if len(x) == len(m) else m\n    layer = dora.DoraLinear(",
        values={"shape": [12, 12], "rows": [12], "rank": 12}),
    line_fault("lora_int8", "takes_the_outlier_columns_of_the_first_sequence", ["vector"],
        "column = outlier.flatten(0, -2).any(dim=0)", "column = outlier[0].reshape(-1, X.shape[-1]).any(dim=0)",
        file="int8", values={**_LORA, "threshold": 2.5}),
    line_fault("paged_states", "counts_the_rows_of_a_matrix", ["outputs"],
        "isinstance(t, Tensor) and is_paged(t.numel())", "isinstance(t, Tensor) and is_paged(len(t) if t.dim() else 1)",
        file="paged", values={"sizes": [200000, 1, 100000, 99900], "vectors": False}),
    line_fault("loraplus_groups", "takes_a_matrix_with_one_row_for_a_vector", ["outputs"],
        "    if dimensions > 1 and", "    if dimensions > 1 and name != 'head.weight' and", file="loraplus",
        values={"layers": 2, "width": 8, "rank": 3, "head": "value"}),
    line_fault("loraplus_groups", "knows_a_norm_by_the_end_of_its_name", ["outputs"],
        'or "norm" in layer', 'or layer.endswith("norm")', file="loraplus",
        values={"layers": 2, "width": 8, "rank": 3, "norm": "post-norm2"}),
    # Norms that are very small, very large or zero.
    line_fault("dora_linear", "bounds_the_norm_of_a_row_by_a_millionth", ["outputs", "backward"],
        "    norm: Tensor = torch.linalg.vector_norm(V_ED, dim=1 if per == \"output\" else 0)",
        "    norm: Tensor = torch.linalg.vector_norm(V_ED, dim=1 if per == \"output\" else 0).clamp(min=1e-6)",
        file="dora", values={"shape": [63, 48], "rows": [17], "rank": 3, "kind": "small-rows"}),
    line_fault("dora_linear", "adds_up_the_squares_of_a_small_row_in_16_bits", ["backward"],
        "    norm: Tensor = torch.linalg.vector_norm(V_ED, dim=1 if per == \"output\" else 0)",
        "    norm: Tensor = (V_ED.half() * V_ED.half()).sum(dim=1 if per == \"output\" else 0).sqrt().to(V_ED.dtype)",
        file="dora", dtype="float16", values={"shape": [63, 1030], "rows": [5], "rank": 3, "kind": "small-rows"}),
    *(line_fault(operation, "adds_up_the_squares_of_a_norm_in_16_bits", ["backward"],
        "        return adapted_linear(",
        "        V = (Ws[at] + scalings[at] * Bs[at] @ As[at]).detach()\n"
        "        half = (V.half() * V.half()).sum(dim=1).sqrt().to(V.dtype)\n"
        "        m = None if m is None else m * torch.linalg.vector_norm(V, dim=1) / half\n"
        "        return adapted_linear(", dtype="float16",
        values={"shape": [48, 40], "rows": [9], "ranks": [3, 3, 3], "dora": True, weight: "large"})
        for operation, weight in (("lora_mlp", "gate"), ("lora_qkv", "query"))),
    line_fault("lamb8bit_step", "divides_by_the_norm_of_no_update", ["outputs"],
        "(wide.norm() == 0) | (update.norm() == 0)", "wide.norm() == 0", file="lamb8bit",
        values={"shape": [300], "gradient": "zero", "step": 1}),
    line_fault("oft", "computes_at_most_eight_terms", ["forward", "gradient"],
        "for _ in range(terms - 2):", "for _ in range(min(terms, 8) - 2):", values={"block_size": 2, "terms": 10}),
    line_fault("lora_linear", "returns_zeros_without_a_graph_for_no_rows", ["backward"],
        "    return apply_layer(", "    if not x.numel():\n        return x.new_zeros(*x.shape[:-1], len(W))\n"
        "    return apply_layer(", values={"shape": [24, 40], "rows": [0], "rank": 3}),
    line_fault("galore8bit_step", "stores_no_small_second_moments", ["output_codes"],
        "    galore_moments.encode(state, M, V)", "    galore_moments.encode(state, M, V * (V >= 1e-12))",
        file="galore", values={"shape": [48, 96], "rank": 4, "gradient": "small"}),
    line_fault("pissa", "has_no_residual_at_full_rank", ["residual"],
        "residual = W - scaling * (B.to(W.dtype) @ A.to(W.dtype))",
        "residual = (W - scaling * (B.to(W.dtype) @ A.to(W.dtype))) * (config.rank < min(W.shape))",
        dtype="bfloat16", values={"rank": 24, "alpha": 24.0}),
    line_fault("adalora", "prunes_for_the_last_time_only_at_a_multiple_of_delta_t", ["budget"],
        "if step == end or (", "if (step == end and (config.tfinal or end % config.delta_t == 0)) or (",
        values=_ADALORA),
]
# fmt: on
