"""Planted faults of GaLore."""

from __future__ import annotations

from functools import partial

from harness.conformance.faults import FaultCase, line_fault

_USUAL = {"rank": 3}
CASE = FaultCase(values={**_USUAL, "eps": 0.1})

_galore = partial(line_fault, "galore", values=_USUAL)
# The layers are wider than the sketch of a randomised SVD.
_randomised = partial(line_fault, "galore", values={**_USUAL, "niter": 1}, inputs=40, outputs=36)

# fmt: off
FAULTS = [
    _galore("keeps_a_parameter_that_moves_to_a_new_group", ["optimizer"],
        "if id(p) not in moving]", "if True]"),
    _galore("drops_a_parameter_that_moves_to_a_new_group", ["optimizer"],
        "            super().add_param_group(param_group)",
        '            old = {id(p) for group in groups for p in group["params"]}\n'
        '            param_group["params"] = [p for p in param_group["params"] if id(p) not in old]\n'
        "            super().add_param_group(param_group)"),
    _galore("ignores_scale", ["each_setting"], '"scale": c.scale', '"scale": 0.25'),
    _galore("ignores_beta1", ["each_setting"], '"beta1": c.beta1', '"beta1": 0.9'),
    _galore("ignores_beta2", ["each_setting"], '"beta2": c.beta2', '"beta2": 0.999'),
    _galore("knows_only_the_usual_sides", ["each_setting"],
        '"side": c.side', '"side": c.side if c.side in ("std", "paper", "reverse_std") else "full"'),
    _galore("projects_the_wrong_side", ["refresh"], '"std": (m < n, m >= n)', '"std": (m >= n, m < n)'),
    _galore("forgets_its_moments_at_a_refresh", ["refresh"], "        fresh = given or",
        '        state |= {"M": state["M"] * 0, "V": state["V"] * 0} if state else {}\n        fresh = given or'),
    _galore("resets_the_step_at_a_refresh", ["refresh"],
        "    correction = math.sqrt(", '    state["step"] = (state["step"] - 1) % 2 + 1\n    correction = math.sqrt('),
    _galore("refreshes_one_step_late", ["refresh"],
        'state.get("step", 0) % update_gap == 0', 'state.get("step", 0) % update_gap == (1 if state else 0)'),
    _galore("refreshes_by_the_optimizers_own_count_of_steps", ["refresh"],
        "loss = loss_of(closure)", "loss = loss_of(closure)\n"
        "        for state in self.state.values():\n"
        '            state["late"] = state.get("late", 0) + all(p.grad is None for p in self.state)',
        'state.get("step", 0) % update_gap == 0', '(state.get("step", 0) + state.get("late", 0)) % update_gap == 0'),
    _galore("never_refreshes", ["refresh"], 'state.get("step", 0) % update_gap == 0', "not state"),
    _galore("forgets_the_scale", ["step", "refresh"], "alpha=lr * (scale if rank else 1.0)", "alpha=lr"),
    _galore("scales_plain_adam_too", ["step", "refresh"], "alpha=lr * (scale if rank else 1.0)", "alpha=lr * scale"),
    _galore("projects_the_weight_decay", ["step", "refresh"], "    basis = Projector(state.get",
        "    G, weight_decay = G + weight_decay * W, 0.0\n    basis = Projector(state.get"),
    _galore("scales_the_weight_decay", ["step", "refresh"],
        "W.mul_(1 - lr * weight_decay)", "W.mul_(1 - lr * scale * weight_decay)"),
    _galore("leaves_out_the_bias_correction", ["step", "refresh"],
        'correction = math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])', "correction = 1.0"),
    _galore("takes_the_smallest_singular_vectors", ["refresh"], "Vh[:rank].T", "Vh[-rank:].T",
        "U[:, :rank]", "U[:, -rank:]"),
    _galore("keeps_all_singular_vectors_in_memory", ["refresh"],
        "U[:, :rank].to(G.dtype, copy=True)", "U[:, :rank].to(G.dtype)",
        "Vh[:rank].T.to(G.dtype, copy=True)", "Vh[:rank].T.to(G.dtype)"),
    _galore("stops_correcting_the_second_moment", ["optimizer"],
        'math.sqrt(1 - beta2 ** state["step"])', 'math.sqrt(1 - beta2 ** min(state["step"], 8))'),
    _galore("ignores_a_change_of_the_learning_rate", ["optimizer"],
        "**options)", '**options | {"lr": self.defaults["lr"]})'),
    _galore("ignores_a_change_of_the_weight_decay", ["optimizer"],
        "**options)", '**options | {"weight_decay": self.defaults["weight_decay"]})'),
    _galore("counts_steps_without_a_gradient", ["optimizer"],
        "loss = loss_of(closure)", "loss = loss_of(closure)\n        for state in self.state.values():\n"
        '            state["step"] += all(p.grad is None for p in self.state)'),
    _galore("lists_the_gradients_before_the_closure", ["optimizer"],
        "loss = loss_of(closure)",
        'there = {id(p) for g in self.param_groups for p in g["params"] if p.grad is not None}\n'
        "        loss = loss_of(closure)",
        "if p.grad is not None:", "if id(p) in there:"),
    # galore-torch does so.
    _galore("calls_its_closure_without_gradients", ["closure"], "loss = loss_of(closure)",
        "with torch.no_grad():\n            loss = None if closure is None else closure()"),
    _galore("takes_the_learning_rate_of_the_first_group", ["closure"],
        'group[name] for name in self.options}',
        'group[name] for name in self.options} | {"lr": self.param_groups[0]["lr"]}'),
    _galore("takes_the_weight_decay_of_the_first_group", ["closure"],
        'group[name] for name in self.options}',
        'group[name] for name in self.options} | {"weight_decay": self.param_groups[0]["weight_decay"]}'),
    _galore("loads_8_bit_codes_in_the_dtype_of_the_parameter", ["resume"], "        restore_dtypes(self, state_dict)\n", "",
        values={**_USUAL, "rank": 40}, inputs=264, outputs=280),
    _galore("overwrites_the_gradient", ["optimizer"],
        "    if weight_decay:", "    G.copy_(project_back(N, basis))\n    if weight_decay:"),
    _galore("stores_small_moments_in_8_bits", ["optimizer"],
        "if R.numel() < adamw8bit.MIN_8BIT_SIZE:", "if R.numel() < 64:",
        "adamw8bit.init_state(R).items()", "adamw8bit.init_state(R, 0).items()", file="galore_moments",
        inputs=64, outputs=96),
    _galore("keeps_small_moments_in_the_dtype_of_the_gradient", ["moments"],
        "torch.zeros_like(R, dtype=adamw8bit.working_dtype(R.dtype))", "torch.zeros_like(R)", file="galore_moments"),
    _galore("keeps_4096_moments_in_32_bits", ["moments"],
        "if R.numel() < adamw8bit.MIN_8BIT_SIZE:", "if R.numel() <= adamw8bit.MIN_8BIT_SIZE:", file="galore_moments"),
    _galore("codes_the_second_moment_with_a_sign", ["moments"],
        "dynamic_map(_SIGNED[name])", "dynamic_map(True)", file="galore_moments"),
    _galore("moves_a_copy_of_a_transposed_parameter_with_8_bits", ["moments"],
        "    W.sub_(project_back", "    (W if bits == 32 else W.contiguous()).sub_(project_back"),
    _galore("forgets_its_state_at_loading", ["optimizer"],
        "restore_dtypes(self, state_dict)", "self.state.clear()"),
    _randomised("ignores_niter", ["refresh"], "    if niter:", "    if False:"),
    _randomised("iterates_once_more", ["refresh"], "old or Projector()), niter)", "old or Projector()), niter + 1)"),
    _randomised("seeds_torchs_own_generator_at_a_refresh", ["settings"],
        "generator = torch.Generator().manual_seed(0)", "generator = torch.manual_seed(0)"),
    _randomised("starts_each_refresh_at_random", ["refresh"], "old or Projector()", "Projector()"),
    _galore("leaves_square_matrices_alone", ["refresh"],
        '"paper": (m <= n, m > n)', '"paper": (m < n, m > n)', values={**_USUAL, "side": "paper"}),
    _galore("always_trains_the_rest", ["gradient"],
        "model.requires_grad_(config.train_rest)", "model.requires_grad_(True)",
        values={**_USUAL, "train_rest": False}),
]
# fmt: on
