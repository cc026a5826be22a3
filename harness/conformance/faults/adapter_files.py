"""Planted faults of loaders of adapter files. A comment such as `vllm#42008` names a public issue about the same fault."""

from __future__ import annotations

from harness.conformance.faults import Fault, line_fault

_SCALING = "return self.alpha(name) / (math.sqrt(rank) if self.use_rslora else rank)"
_ALPHA = "return self.alpha_pattern.get(_matching(self.alpha_pattern, name), self.lora_alpha)"
_MATCH = 'next((one for one in patterns if re.match(rf"(.*\\.)?({one})$", name)), name)'
_UPDATES = "    for update in reading.updates:\n        layer: Any = model.get_submodule(update.path)\n"
_SET = "setattr(layer, update.parameter, nn.Parameter(update.weight(layer, tensors), requires_grad=False))"
_PRODUCT = "else B_ER @ A_RD)"
_GAIN = "gain(tensors[self.magnitude].to(W.dtype).flatten(), norms(V_ED))[:, None] * V_ED"
_STACK = "A_KRD, B_ERK = A.reshape(experts, -1, A.shape[-1]), B.reshape(len(B), -1, experts)"
_SUM = 'torch.einsum("erk,krd->ked", B_ERK, A_KRD)'
_START = 'kind, start = _kind(model.get_submodule(path)), f"{PREFIX}{path}"'
_REPLACED = "replaced = {key: name for key, name in names.items() if name in parameters}"


def _logits(name: str, *lines: str, adapter: str) -> Fault:
    return line_fault("adapter_files", name, ["logits"], *lines, file="adapter_file", adapter=adapter)


# fmt: off
FAULTS = [
    # sglang#40835, vllm#10798, TensorRT-LLM#1668
    _logits("ignores_rslora", _SCALING, "return self.alpha(name) / rank", adapter="rslora"),
    # vllm#55545
    _logits("ignores_rslora_of_experts", "settings.rank(whole), settings.scaling(whole)",
        "settings.rank(whole), settings.alpha(whole) / settings.rank(whole)", adapter="experts_rslora"),
    _logits("takes_the_root_of_alpha_too", _SCALING,
        "return math.sqrt(self.alpha(name) / rank) if self.use_rslora else self.alpha(name) / rank", adapter="rslora"),
    # mlx-vlm#986
    _logits("multiplies_by_alpha", _SCALING, "return self.alpha(name)", adapter="plain"),
    # peft#3738, when it swaps one adapter for another
    _logits("scales_by_the_usual_rank", "        rank = self.rank(name)\n", "        rank = self.r\n",
        adapter="rank_pattern"),
    _logits("ignores_alpha_pattern", _ALPHA, "return self.lora_alpha", adapter="alpha_pattern"),
    _logits("compares_patterns_as_text", _MATCH,
        'next((one for one in patterns if name == one or name.endswith(f".{one}")), name)', adapter="alpha_pattern"),
    _logits("lets_the_last_pattern_win", "_matching(self.alpha_pattern, name)",
        "_matching(dict(reversed(self.alpha_pattern.items())), name)", adapter="both_patterns"),
    _logits("takes_the_scaling_of_the_whole_file", "settings.rank(path), settings.scaling(path), A, B",
        "settings.rank(path), settings.scaling(''), A, B", adapter="mixed_ranks"),
    # Read the first `r` ranks of each adapter, as from a slot of that size.
    _logits("reads_a_slot_of_the_usual_rank", _PRODUCT, "else B_ER[:, :2] @ A_RD[:2])", adapter="mixed_ranks"),
    # Read the memory of B (E, R) as (R, E).
    _logits("reads_b_transposed", _PRODUCT, "else B_ER.reshape(len(A_RD), -1).T @ A_RD)", adapter="plain"),
    # unsloth-zoo#942
    _logits("loads_gate_twice_and_up_never", _START,
        """kind, start = _kind(model.get_submodule(path)), f"{PREFIX}{path.replace('up_proj', 'gate_proj')}\"""",
        adapter="plain"),
    _logits("adapts_all_layers", "return path in wanted or (_ends_with(path, wanted) and self._transforms(path))",
        "return path in wanted or _ends_with(path, wanted)",
        'if update.A in there and update.B in there:\n            updates.append(update)',
        "from dataclasses import replace\n"
        "        own = {name: key.replace('.0.', '.1.') for name, key in vars(update).items() if name in ('A', 'B')}\n"
        "        if own['A'] in there:\n            updates.append(replace(update, **own))",
        adapter="some_layers"),
    _logits("rounds_the_update_to_16_bits", _PRODUCT, "else (B_ER.bfloat16() @ A_RD.bfloat16()).to(W.dtype))",
        adapter="bfloat16"),
    # Apply the tensors of a layer that the base does not have to another layer.
    _logits("counts_layers_from_the_end", _UPDATES,
        "    tensors = {key.replace('layers.7.', 'layers.1.'): tensor for key, tensor in tensors.items()}\n" + _UPDATES,
        adapter="unmatched_keys"),
    # sglang#18634
    _logits("never_wraps_a_tied_head", _UPDATES,
        _UPDATES + "        if layer is not model.get_input_embeddings() and "
        "layer.weight is model.get_input_embeddings().weight:\n            continue\n", adapter="tied_head"),
    _logits("adapts_both_tied_layers", _SET, "getattr(layer, update.parameter).copy_(update.weight(layer, tensors))",
        adapter="tied_embedding"),
    _logits("replaces_both_tied_layers", "setattr(module, own, nn.Parameter(value.clone(), requires_grad=False))",
        "getattr(module, own).copy_(value)", adapter="tied_saved_head"),
    _logits("ignores_modules_to_save", _REPLACED, "replaced = {}", adapter="modules_to_save"),
    _logits("keeps_the_head_of_the_base", _REPLACED, "replaced = {}", adapter="classifier"),
    _logits("ignores_biases", _REPLACED, "replaced = {}", adapter="bias_all"),
    _logits("ignores_biases_of_adapted_layers", '.replace(".base_layer.", ".")', "", adapter="bias_lora_only"),
    _logits("ignores_lora_bias", "        if added is not None:\n", "        if False:\n", adapter="lora_bias"),
    _logits("does_not_scale_lora_bias", "return self.scaling * tensors[self.bias] if", "return tensors[self.bias] if",
        adapter="lora_bias"),
    # unsloth-zoo#954
    _logits("ignores_the_magnitude", _GAIN, "V_ED", adapter="dora"),
    _logits("divides_by_the_norm_of_the_base", "norms(V_ED))[:, None] * V_ED", "norms(W_ED))[:, None] * V_ED",
        adapter="dora"),
    _logits("ignores_embeddings", 'if kind not in KINDS:', 'if kind not in ("linear", "Conv1D"):',
        adapter="embedding"),
    # A square layer has no shape that could reveal this.
    _logits("adapts_a_square_conv1d_as_a_linear_layer", 'return self.kind in ("Conv1D", "embedding")',
        'return self.kind == "embedding" or (self.kind == "Conv1D" and len(set(module.weight.shape)) > 1)',
        adapter="conv1d"),
    _logits("takes_the_norm_of_a_square_conv1d_transposed", _GAIN,
        "gain(tensors[self.magnitude].to(W.dtype).flatten(), norms(V_ED.T if V_ED.shape[0] == V_ED.shape[1] else V_ED))"
        "[:, None] * V_ED", adapter="conv1d_dora"),
    # vllm#31534, unsloth#6930
    _logits("reads_b_of_experts_expert_by_expert", _STACK,
        "A_KRD, B_ERK = A.reshape(experts, -1, A.shape[-1]), B.reshape(len(B), experts, -1).transpose(1, 2)",
        adapter="experts"),
    _logits("reads_a_of_experts_rank_by_rank", _STACK,
        "A_KRD = A.reshape(-1, experts, A.shape[-1]).transpose(0, 1)\n    B_ERK = B.reshape(len(B), -1, experts)",
        adapter="experts"),
    # unsloth-zoo#913
    _logits("transposes_square_experts", _SUM,
        'torch.einsum("erk,krd->kde" if len(B) == A.shape[1] else "erk,krd->ked", B_ERK, A_KRD)', adapter="experts"),
    _logits("swaps_w1_and_w3_of_experts", "return matrix if self.half is None else matrix.chunk(2)[self.half]",
        "return matrix if self.half is None else matrix.chunk(2)[1 - self.half]", adapter="experts_by_name"),
    _logits("adapts_the_next_expert", "matrix = parameter[self.expert]", "matrix = parameter[self.expert - 1]",
        adapter="experts_by_name"),
    # peft#3318
    _logits("counts_experts_as_layers", 'or [r".*?\\.[^.]*\\.(?P<idx>\\d+)\\."]', 'or [r".*\\.[^.]*\\.(?P<idx>\\d+)\\."]',
        adapter="experts_by_name_some_layers"),
    # peft 0.21.2, which turns w1 and w3 into one update of twice the rank and twice alpha
    _logits("doubles_rank_and_alpha_of_stacked_experts",
        "rank, scaling, expert = settings.rank(path), settings.scaling(path), int(found[\"expert\"])",
        "rank, scaling, expert = settings.rank(path), settings.scaling(path), int(found[\"expert\"])\n"
        "            scaling *= math.sqrt(2) if settings.use_rslora and half is not None else 1",
        adapter="experts_by_name_rslora"),
    # unsloth-zoo#812
    _logits("drops_the_update_of_experts", "if W_ED.dim() == 3 else", "* 0 if W_ED.dim() == 3 else", adapter="experts"),
]
# fmt: on
