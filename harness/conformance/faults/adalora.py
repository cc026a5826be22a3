"""Planted faults of AdaLoRA."""

from __future__ import annotations

from functools import partial

from harness.conformance.faults import FaultCase, line_fault

_USUAL = {"rank": 6, "target_rank": 2, "alpha": 8.0}
CASE = FaultCase(values=_USUAL)

_adalora = partial(line_fault, "adalora", values=_USUAL)

# fmt: off
FAULTS = [
    _adalora("draws_uniform_numbers", ["initial"], "torch.randn(shape, generator=generator, dtype=torch.float64) * _STD",
        "(2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * 3**0.5 * _STD", inputs=1030, outputs=63),
    _adalora("lets_the_budget_fall_as_a_square", ["budget"],
        "(end - step) ** 3 // (end - config.tinit) ** 3", "(end - step) ** 2 // (end - config.tinit) ** 2"),
    _adalora("forgets_the_final_steps_in_the_budget", ["budget"],
        "    end = config.total_steps - config.tfinal\n    if step <= config.tinit",
        "    end = config.total_steps\n    if step <= config.tinit"),
    _adalora("stops_above_the_target", ["budget"], "        return target\n", "        return target + 1\n"),
    _adalora("prunes_one_step_late", ["budget"], "step % config.delta_t == 0", "step % config.delta_t == 1"),
    _adalora("does_not_apply_the_mask", ["budget"],
        "masked_fill_(~self.get_buffer", "masked_fill_(False & self.get_buffer"),
    _adalora("keeps_the_least_important", ["budget"], "descending=True", "descending=False"),
    # Sum the scores of a triplet instead of averaging them, so that the wider side dominates.
    _adalora("sums_the_scores_of_a_triplet", ["budget"],
        "s_B.mean(dim=0) + s_A.mean(dim=1)", "s_B.sum(dim=0) + s_A.sum(dim=1)"),
    _adalora("leaves_the_uncertainty_out_of_the_score", ["budget"], "return I_bar * U_bar", "return I_bar"),
    _adalora("gives_each_layer_its_own_budget", ["budget"],
        "masks = largest_mask(torch.cat([layer.scores() for layer in layers]), budget(step, config, len(layers)))",
        "masks = torch.cat([largest_mask(layer.scores(), budget(step, config, 1)) for layer in layers])"),
    _adalora("keeps_the_sign_of_a_sensitivity", ["importance"], "return (w * grad).abs()", "return w * grad"),
    _adalora("computes_sensitivities_in_float16", ["importance"],
        "I = sensitivity(w.to(I_bar.dtype), grad.to(I_bar.dtype))", "I = sensitivity(w, grad).to(I_bar.dtype)",
        dtype="float16"),
    _adalora("squares_the_sensitivity", ["importance"], "return (w * grad).abs()", "return (w * grad).square()"),
    _adalora("swaps_the_betas", ["importance"],
        "observe(self.config.beta1, self.config.beta2)", "observe(self.config.beta2, self.config.beta1)"),
    # fused until November 2026
    _adalora("rounds_a_small_beta", ["unused"],
        "return beta1 * I_bar + (1 - beta1) * I", "return torch.lerp(I_bar, I, 1 - beta1)",
        values={**_USUAL, "beta1": 1e-5}),
    _adalora("measures_uncertainty_by_the_previous_average", ["importance"],
        "            I_bar.copy_(smoothed(I_bar, I, beta1))\n            U_bar.copy_(uncertainty(U_bar, I, I_bar, beta2))",
        "            U_bar.copy_(uncertainty(U_bar, I, I_bar, beta2))\n            I_bar.copy_(smoothed(I_bar, I, beta1))"),
    _adalora("scales_by_the_triplets_that_are_left", ["pruned"],
        "        y_TE: Tensor = self.base(x_TD) + self.scaling * (h_TR",
        "        y_TE: Tensor = self.base(x_TD) + self.scaling / (self.E != 0).float().mean() * (h_TR"),
    _adalora("gives_a_pruned_lambda_no_gradient", ["pruned"],
        "h_TR = self.dropout(x_TD) @ (self.A * self.E).T",
        'h_TR = self.dropout(x_TD) @ (self.A * self.E * self.get_buffer("mask")).T'),
    _adalora("scores_in_the_dtype_of_its_tensors", ["budget"],
        'importance(self.get_buffer(f"exp_avg_ipt_{name}"), self.get_buffer(f"exp_avg_unc_{name}"))',
        'importance(*(self.get_buffer(f"exp_avg_{i}_{name}").to(self.E.dtype) for i in ("ipt", "unc")))',
        dtype="float16"),
    _adalora("merges_no_lambda_outside_the_mask", ["merge"],
        "return self.scaling * (self.B @ (self.A * self.E))",
        'return self.scaling * (self.B @ (self.A * self.E * self.get_buffer("mask")))'),
    _adalora("replaces_the_parameter_of_the_lambdas", ["budget"],
        "self.E.masked_fill_(~self.get_buffer(\"mask\"), 0.0)",
        'self.E = nn.Parameter(self.E.masked_fill(~self.get_buffer("mask"), 0.0))'),
    _adalora("leaves_the_last_mask_out_of_its_state", ["budget"],
        'return averages | {"mask": self.get_buffer("mask")}', "return averages"),
    _adalora("goes_on_with_its_own_mask_after_loading", ["budget"],
        'layer.get_buffer("mask").copy_(mask[:, None])',
        'layer.get_buffer("mask").copy_(mask[:, None])\n                layer.own = mask[:, None]',
        'masked_fill_(~self.get_buffer("mask")', 'masked_fill_(~vars(self).get("own", self.get_buffer("mask"))'),
    _adalora("prunes_no_more_after_the_schedule", ["budget"],
        "        elif step > end:\n", "        elif end < step <= config.total_steps:\n"),
    _adalora("keeps_the_averages_of_a_layer_without_gradients", ["unused"],
        "grad = torch.zeros_like(w) if w.grad is None else w.grad",
        "if w.grad is None:\n                continue\n            grad = w.grad"),
    _adalora("squares_lambda", ["forward", "gradient"],
        "self.dropout(x_TD) @ (self.A * self.E).T", "self.dropout(x_TD) @ (self.A * self.E**2).T"),
    _adalora("forgets_its_scaling", ["forward", "gradient"],
        "self.base(x_TD) + self.scaling * (h_TR @ self.B.T)", "self.base(x_TD) + h_TR @ self.B.T"),
    _adalora("starts_with_lambdas_of_one", ["initial"],
        "E = torch.zeros(config.rank, 1,", "E = torch.ones(config.rank, 1,"),
    _adalora("adds_nothing_to_the_loss", ["regularizer"],
        "        if self.config.orthogonality == 0:", "        if True:"),
    _adalora("keeps_only_p_orthogonal", ["regularizer"],
        "for gram in (layer.B.T @ layer.B, layer.A @ layer.A.T)", "for gram in (layer.B.T @ layer.B,)"),
    _adalora("forgets_gamma", ["regularizer"],
        "return self.config.orthogonality * orthogonality(", "return 1.0 * orthogonality("),
    _adalora("ignores_gamma", ["each_setting"],
        "return self.config.orthogonality * orthogonality(", "return 0.5 * orthogonality("),
    _adalora("shares_its_averages_with_a_deep_copy", ["walk"],
        "    def tensors(self) -> dict[str, nn.Parameter]:",
        "    def __deepcopy__(self, memo):\n        import copy\n"
        "        memo |= {id(buffer): buffer for buffer in self.buffers(recurse=False)}\n"
        "        made = self.__class__.__new__(self.__class__)\n        memo[id(self)] = made\n"
        "        vars(made).update(copy.deepcopy(vars(self), memo))\n        return made\n\n"
        "    def tensors(self) -> dict[str, nn.Parameter]:"),
    _adalora("adds_a_term_where_gamma_is_zero", ["regularizer"],
        "        if self.config.orthogonality == 0:", "        if False:",
        "return self.config.orthogonality * orthogonality(", "return 0.1 * orthogonality(",
        values={**_USUAL, "orthogonality": 0.0}),
    _adalora("takes_the_mean_of_norms_for_the_sum_of_squares", ["regularizer"],
        'if form == "squared-sum":', 'if form == "":', values={**_USUAL, "regularization": "squared-sum"}),
    _adalora("merges_a_square_conv1d_transposed", ["merge"],
        'W_ED.T if kind_of(base) in ("Conv1D", "embedding") else W_ED',
        "W_ED", file="layers", layer="conv1d", inputs=32, outputs=32),
    _adalora("pads_a_convolution_with_zeros", ["forward", "gradient"], 'if base.padding_mode != "zeros":', "if False:",
        file="lora_layers", layer="conv2d-reflect"),
    _adalora("reads_height_and_width_of_a_kernel_exchanged", ["forward", "merge"],
        "super().delta().view(self.base.weight.shape)", "super().delta().view(self.base.weight.shape).mT", layer="conv2d"),
    _adalora("does_not_drop_before_a_convolution", ["dropout"],
        "convolve(self.base, self.dropout(x),", "convolve(self.base, x,", values={**_USUAL, "dropout": 0.5}, layer="conv2d"),
    _adalora("leaves_the_mask_out_of_the_state_dict", ["save"],
        'torch.ones_like(E, dtype=torch.bool))', 'torch.ones_like(E, dtype=torch.bool), persistent=False)'),
]
# fmt: on
