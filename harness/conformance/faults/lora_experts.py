"""Planted faults of the Operation `lora_experts`, and of LoRA's layer on stacked experts. Most were reported in public."""

from __future__ import annotations

from functools import partial

from harness.conformance.faults import line_fault

_CASE = {"shape": [24, 20], "experts": 3, "rank": 3}
_SQUARE = {"shape": [16, 16], "experts": 4, "rank": 4}
_SQUARE_UP = {"shape": [32, 16], "experts": 4, "rank": 3}
_FEW = {"shape": [20, 12], "experts": 8, "rank": 5, "used": 3}
_READ_A = "return A.reshape(experts, -1, A.shape[-1]), "
_READ_B = "B.reshape(len(B), -1, experts).permute(2, 0, 1)"
_ADDED = "return update_KED.transpose(1, 2) if transposed else update_KED"
_WEIGHTED = "weights[token, n, None]"
_UPDATED = "self.weight(name) + self.update(name) for name in self.A}"
_CALLED = 'vars(called)["_parameters"] = {**called._parameters, **weights}'

_block = partial(line_fault, "lora_experts", file="lora_experts", values=_CASE)
_layer = partial(
    line_fault, "lora", file="lora_experts", values={"rank": 3, "alpha": 8.0}, layer="experts", inputs=24, outputs=12
)

# fmt: off
FAULTS = [
    # A and B have the same shapes in both packings, and the norms of the updates are right.
    _block("reads_b_expert_by_expert", ["outputs", "backward"],
        _READ_B, "B.reshape(len(B), experts, -1).transpose(0, 1)"),
    _block("reads_a_rank_by_rank", ["outputs", "backward"],
        _READ_A, "return A.reshape(-1, experts, A.shape[-1]).transpose(0, 1), "),
    _block("reads_b_of_a_padded_slot_expert_by_expert", ["outputs"],
        _READ_B, "B.reshape(len(B), experts, -1).transpose(0, 1)", values=_CASE | {"rank": 2, "padding": 3}),
    # Nothing raises, because the weight and its update are square.
    _block("transposes_the_update_of_square_experts", ["outputs"],
        _ADDED, "return update_KED.transpose(1, 2) if transposed or len({*update_KED.shape[1:]}) == 1 else update_KED",
        values=_SQUARE),
    _block("forgets_that_experts_are_transposed", ["outputs"],
        _ADDED, "return update_KED.transpose(1, 2) if transposed and len({*update_KED.shape[1:]}) > 1 else update_KED",
        values=_SQUARE | {"transposed": True}),
    _block("swaps_a_and_b_where_both_fit", ["outputs"],
        "A_KRD, B_KER = unpacked(A, B, experts)",
        "A_KRD, B_KER = unpacked(A, B, experts)\n"
        "    if A_KRD.shape == B_KER.mT.shape:\n        A_KRD, B_KER = B_KER.mT, A_KRD.mT", values=_SQUARE_UP),
    _block("wraps_offsets_of_experts_at_32_bits", ["calls"], "    experts = len(gate_up)\n",
        "    experts = len(gate_up)\n"
        "    reached = [k if k * gate_up.stride(0) < 2**31 else 0 for k in range(experts)]\n"
        "    gate_up = gate_up[reached]\n", file="", dtype="bfloat16"),                # axolotl#3865
    _block("swaps_gate_and_up", ["outputs"], "gate, up = (x[token]", "up, gate = (x[token]"),
    _block("trains_only_the_down_projection", ["backward"],
        "stacked_update(gate_up_A, gate_up_B,", "stacked_update(gate_up_A.detach(), gate_up_B.detach(),", file=""),
    _block("gives_no_gradient_to_the_router", ["backward"], _WEIGHTED, "weights.detach()[token, n, None]"),
    _block("weights_every_expert_like_the_first", ["outputs"], _WEIGHTED, "weights[token, 0, None]"),
    _block("counts_only_the_experts_that_have_tokens", ["outputs"],
        "x[token] @ gate_up[k].T", "x[token] @ gate_up[max(0, k - int(chosen.min()))].T", values=_FEW),
    _block("adds_the_update_of_an_expert_to_all", ["outputs"], "scaling * (B_KER @ A_KRD)",
        "scaling * (B_KER @ A_KRD).mean(0, keepdim=True).expand(experts, -1, -1)"),
    _block("drops_the_scaling", ["outputs"], "scaling * (B_KER @ A_KRD)", "B_KER @ A_KRD"),

    _layer("leaves_the_down_projection_unadapted", ["parameters"],
        "in stacked_weights(base).items():", "in list(stacked_weights(base).items())[:1]:"),
    _layer("runs_the_experts_without_their_adapter", ["forward", "gradient"], _CALLED,
        "return self.base(*arguments, **named)"),
    _layer("detaches_a_of_some_experts", ["gradient", "step"], _UPDATED,
        "self.weight(name) + (self.update(name) if name == 'down_proj' else self.update(name).detach()) "
        "for name in self.A}"),
    _layer("merges_only_the_first_projection", ["merge"], "            for name in self.A:\n                dense",
        "            for name in list(self.A)[:1]:\n                dense"),
    _layer("merges_all_experts_but_the_last", ["merge"],
        ".copy_(self.weight(name) + self.update(name))", "[:-1].add_(self.update(name)[:-1])"),
    _layer("keeps_the_update_of_its_first_call", ["forward", "save"], _CALLED,
        "self.kept = getattr(self, 'kept', {n: w.detach() for n, w in weights.items()})\n"
        '        vars(called)["_parameters"] = {**called._parameters, **self.kept}'),
    _layer("ignores_rslora_of_experts", ["forward"],
        "config.init, p, generator), s)", "config.init, p, generator), config.alpha / R)",
        file="", values={"rank": 3, "alpha": 8.0, "rslora": True}),
]
