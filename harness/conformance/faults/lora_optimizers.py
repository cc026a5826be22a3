"""Planted faults of the optimizers of LoRA."""

from __future__ import annotations

from functools import partial

from harness.conformance.faults import line_fault

_LORAFA = {"shape": [48, 96], "ranks": [4, 8]}
_DECAYED = _LORAFA | {"weight_decay": 0.1, "eps": 0.1}
_STACKED = {"shape": [24, 40], "ranks": [2, 3], "experts": 3}
_SOLVED = "g_KER @ torch.linalg.pinv(square_KRR)"
_CORRECTED = "        g = corrected(g, A, scaling, experts)"
_STEPPED = "return adamw_step(B, g, m, v, **adamw)"
_LAYERS = "for A, B, g, m, v, scaling in layers]"

_RIEMANNIAN = {"shape": [48, 96], "ranks": [4, 8]}
_RANK_ONE = _RIEMANNIAN | {"B": "one-direction"}
_FOR_A = "torch.linalg.solve(of_B, gA_KRD)"
_FOR_B = "torch.linalg.solve(of_A, gB_KER, left=False)"
_BOTH = (
    "    return optimizer_step(kind, A, gA, *moments_A, **options), optimizer_step(kind, B, gB, *moments_B, **options)"
)

_PLUS = {"layers": 2, "width": 8, "rank": 3, "weight_decay": 0.5}
_EMBEDDED = _PLUS | {"embedding": "adapted"}
_NAMED = '    if tensor.startswith("lora_embedding"):'
_MATRIX = 'if dimensions > 1 and tensor != "lora_B":'
_VECTOR = 'return lr * ratio, 0.0 if tensor.endswith("bias") or "norm" in layer else weight_decay'

_lorafa = partial(line_fault, "lorafa_step", file="lorafa", values=_LORAFA)
_adamw = partial(line_fault, "lorafa_step", file="adamw", values=_DECAYED)
_loraplus = partial(line_fault, "loraplus_groups", file="loraplus", values=_PLUS)
_riemannian = partial(line_fault, "riemannian_lora_step", file="riemannian", values=_RIEMANNIAN)

# fmt: off
FAULTS = [
    _lorafa("divides_by_the_scaling_once", ["outputs"], "/ scaling**2", "/ scaling"),
    _lorafa("multiplies_by_the_scaling", ["outputs"], "/ scaling**2", "* scaling**2"),
    _lorafa("forgets_the_scaling", ["outputs"], " / scaling**2\n", "\n"),
    # peft#3315: the scaling of the config, in place of the scaling of each layer.
    _lorafa("scales_all_layers_like_the_first", ["outputs"], _LAYERS,
        "for A, B, g, m, v, scaling in ((*layer[:5], scalings[0]) for layer in layers)]"),
    _lorafa("does_not_correct_the_gradient", ["outputs"], _CORRECTED, "        pass"),
    _lorafa("corrects_the_gradient_of_version_1", ["outputs"], 'if correction == "least-squares":', "if True:",
        values=_LORAFA | {"correction": "none"}),
    _lorafa("multiplies_in_place_of_solving", ["outputs"], _SOLVED, "(g_KER @ square_KRR)"),
    _lorafa("uses_the_diagonal_alone", ["outputs"], _SOLVED, "(g_KER / square_KRR.diagonal(dim1=1, dim2=2)[:, None])"),
    _lorafa("damps_the_inverse_as_riemannian_lora_does", ["outputs"], "DELTA * torch.eye", "1e-2 * torch.eye"),
    _lorafa("turns_a_nan_of_a_into_zeros", ["nonfinite"], ", g_KER.where(finite_K11, torch.nan)", ", g_KER"),
    # peft 0.21.2: the product runs under autocast.
    _lorafa("rounds_the_correction_to_bfloat16", ["outputs"],
        "return packed(A_KRD, new_KER)[1].to(", "return packed(A_KRD, new_KER)[1].bfloat16().to("),
    _lorafa("forgets_the_correction_in_the_second_moment", ["outputs"], _CORRECTED,
        "        raw, g = g, corrected(g, A, scaling, experts)\n"
        "        (b1, b2), v = adamw['betas'], v + (1 - adamw['betas'][1]) * (raw * raw - g * g) / adamw['betas'][1]"),
    _lorafa("decays_a_layer_that_has_no_gradient", ["outputs"],
        "        return B, m, v", '        return B * (1 - adamw["lr"] * adamw["weight_decay"]), m, v',
        values=_DECAYED | {"unused": "second"}),
    _lorafa("counts_a_missing_gradient_as_zeros", ["outputs"],
        "        return B, m, v", "        g = torch.zeros_like(B)", values=_LORAFA | {"unused": "second"}),
    _lorafa("corrects_in_place", ["arguments"], _CORRECTED, "        g.copy_(corrected(g, A, scaling, experts))"),
    # peft 0.21.2: one matrix of all experts, whose rows are those of A and not the columns of B.
    _lorafa("corrects_stacked_experts_as_one_matrix", ["outputs"],
        "unpacked(A.to(wide), g.to(wide), experts)", "unpacked(A.to(wide), g.to(wide), 1)", values=_STACKED),
    _lorafa("reads_the_gradient_expert_by_expert", ["outputs"], "    square_KRR =",
        "    g_KER = g.to(wide).view(len(g), experts, -1).transpose(0, 1)\n    square_KRR =",
        "return packed(A_KRD, new_KER)[1]", "return new_KER.transpose(0, 1).flatten(1)", values=_STACKED),
    line_fault("lorafa_step", "trains_a_as_well", ["outputs"], "(A.clone(), *", "(A - 1e-3 * A, *", values=_LORAFA),
    line_fault("lorafa_step", "leaves_other_tensors_untrained", ["outputs"],
        "*adamw_step(other, other_g, other_m, other_v, **options))", "other.clone(), other_m.clone(), other_v.clone())",
        values=_LORAFA),

    _adamw("decays_before_the_update", ["outputs"],
        "p = (1 - lr * weight_decay) * (p - lr * math.sqrt(c2) / c1 * (m / (v.sqrt() + eps)))",
        "p = (1 - lr * weight_decay) * p - lr * math.sqrt(c2) / c1 * (m / (v.sqrt() + eps))"),
    _adamw("adds_eps_after_the_bias_correction", ["outputs"],
        "math.sqrt(c2) / c1 * (m / (v.sqrt() + eps)))", "(m / c1 / ((v / c2).sqrt() + eps)))"),
    _adamw("always_corrects_the_bias", ["outputs"], "beta**step if bias_correction else 1.0", "beta**step",
        values=_DECAYED | {"bias_correction": False}),
    _adamw("counts_steps_from_zero", ["outputs"], "1 - beta**step", "1 - beta ** max(1, step - 1)"),
    _adamw("uses_the_first_beta_twice", ["outputs"], "v = betas[1] * v", "v = betas[0] * v"),

    _riemannian("leaves_the_gradient_of_a_as_it_is", ["outputs"], _FOR_A, "gA_KRD"),
    _riemannian("leaves_the_gradient_of_b_as_it_is", ["outputs"], _FOR_B, "gB_KER"),
    _riemannian("exchanges_the_inverses", ["outputs"],
        "of_A, of_B = A_KRD", "of_B, of_A = A_KRD", values=_RIEMANNIAN | {"shape": [48, 48]}),
    _riemannian("multiplies_in_place_of_solving", ["outputs"], _FOR_B, "gB_KER @ of_A"),
    _riemannian("takes_the_inverse_square_root", ["outputs"], _FOR_B,
        "gB_KER @ torch.linalg.eigh(of_A).eigenvectors @ torch.diag_embed(torch.linalg.eigvalsh(of_A) ** -0.5) "
        "@ torch.linalg.eigh(of_A).eigenvectors.mT"),
    _riemannian("ignores_delta", ["outputs"], "damping = delta * torch", "damping = 1e-6 * torch"),
    _riemannian("adds_delta_to_every_element", ["outputs"], "torch.eye(A_KRD.shape[1], dtype=wide,",
        "torch.ones(2 * (A_KRD.shape[1],), dtype=wide,"),
    _riemannian("damps_by_the_size_of_the_matrix", ["outputs"], "damping = delta * torch",
        "damping = delta * (B_KER * B_KER).sum() * torch"),
    _riemannian("damps_only_the_inverse_for_b", ["outputs"], "B_KER.mT @ B_KER + damping",
        "B_KER.mT @ B_KER + 1e-6 * torch.eye(A_KRD.shape[1], dtype=wide)"),
    _riemannian("takes_the_inverse_for_b_from_the_new_a", ["outputs"], _BOTH,
        "    of_A = optimizer_step(kind, A, gA, *moments_A, **options)\n"
        "    gB = preconditioned(gA, gradients[1], of_A[0], B, delta)[1]\n"
        "    return of_A, optimizer_step(kind, B, gB, *moments_B, **options)"),
    _riemannian("preconditions_the_update_of_adamw", ["outputs"],
        "    gA, gB = preconditioned(gA, gB, A, B, delta, experts)\n" + _BOTH,
        "    after = optimizer_step(kind, A, gA, *moments_A, **options), "
        "optimizer_step(kind, B, gB, *moments_B, **options)\n"
        "    dA, dB = preconditioned(after[0][0] - A, after[1][0] - B, A, B, delta)\n"
        "    return (A + dA, *after[0][1:]), (B + dB, *after[1][1:])"),
    _riemannian("preconditions_the_weight_decay", ["outputs"],
        "    gA, gB = preconditioned(gA, gB, A, B, delta, experts)",
        "    decay = options['weight_decay']\n"
        "    gA, gB = preconditioned(gA + decay * A, gB + decay * B, A, B, delta)\n"
        "    options['weight_decay'] = 0.0",
        values=_RIEMANNIAN | {"optimizer": "gd", "weight_decay": 0.1}),
    _riemannian("skips_the_inverse_if_it_is_nearly_singular", ["outputs"], _FOR_A,
        "(gA_KRD if torch.linalg.cond(of_B).max() > 100 else torch.linalg.solve(of_B, gA_KRD))", values=_RANK_ONE),
    _riemannian("preconditions_stacked_experts_as_one_matrix", ["outputs"],
        "unpacked(A.to(wide), B.to(wide), experts)", "unpacked(A.to(wide), B.to(wide), 1)",
        "unpacked(gA.to(wide), gB.to(wide), experts)", "unpacked(gA.to(wide), gB.to(wide), 1)", values=_STACKED),
    _riemannian("decays_a_layer_that_did_not_run", ["outputs"], "return (A, *moments_A), (B, *moments_B)",
        'return (A * (1 - options["lr"] * options["weight_decay"]), *moments_A), (B, *moments_B)',
        values=_RIEMANNIAN | {"unused": "second", "weight_decay": 0.1}),
    _riemannian("solves_in_16_bits", ["outputs"], "wide = torch.promote_types(A.dtype, torch.float32)",
        "wide = torch.float32\n    A, B, gA, gB = (t.bfloat16().to(t.dtype) for t in (A, B, gA, gB))"),
    _riemannian("multiplies_a_by_itself_in_16_bits", ["outputs"],
        "of_A, of_B = A_KRD @ A_KRD.mT + damping",
        "half = A_KRD.to(A.dtype)\n    of_A, of_B = (half @ half.mT).to(wide) + damping",
        dtype="float16", values={"shape": [48, 96], "ranks": [4, 8], "A": "nearly-one-direction", "delta": 1e-6}),
    _riemannian("changes_its_gradients_in_place", ["arguments"],
        "    gA, gB = preconditioned(gA, gB, A, B, delta, experts)",
        "    for g, new in zip((gA, gB), preconditioned(gA, gB, A, B, delta)):\n        g.copy_(new)"),

    # peft#3503: the group of embeddings is always empty.
    _loraplus("trains_embeddings_like_linear_layers", ["outputs"], _NAMED, "    if False:", values=_EMBEDDED),
    _loraplus("trains_b_of_embeddings_at_the_higher_rate", ["outputs"],
        "return lr_embedding, weight_decay", "return lr_embedding * (ratio if tensor[-1] == 'B' else 1), weight_decay",
        values=_EMBEDDED),
    _loraplus("does_not_decay_embeddings", ["outputs"], "return lr_embedding, weight_decay", "return lr_embedding, 0.0",
        values=_EMBEDDED),
    _loraplus("applies_the_ratio_to_a", ["outputs"], _MATRIX, 'if dimensions > 1 and tensor != "lora_A":'),
    _loraplus("divides_the_rate_of_a_by_the_ratio", ["outputs"],
        "        return lr, weight_decay", "        return lr / ratio, weight_decay"),
    _loraplus("applies_the_ratio_to_a_head", ["outputs"], _MATRIX, 'if tensor == "lora_A":',
        values=_PLUS | {"head": "trained"}),
    _loraplus("trains_vectors_at_the_lower_rate", ["outputs"], _MATRIX, 'if tensor != "lora_B":',
        values=_PLUS | {"vector": "magnitude"}),
    _loraplus("decays_biases", ["outputs"], _VECTOR, 'return lr * ratio, 0.0 if "norm" in layer else weight_decay',
        values=_PLUS | {"vector": "lora-bias"}),
    _loraplus("decays_norms", ["outputs"], _VECTOR, 'return lr * ratio, 0.0 if tensor.endswith("bias") else weight_decay',
        values=_PLUS | {"norm": "layer-norm"}),
    # peft 0.21.2: only torch.nn.LayerNorm is a norm.
    _loraplus("decays_rms_norms", ["outputs"], '"norm" in layer', '"layer_norm" in layer',
        values=_PLUS | {"norm": "rms-norm"}),
    _loraplus("does_not_decay_magnitudes", ["outputs"], _VECTOR,
        "return lr * ratio, 0.0 if dimensions == 1 else weight_decay", values=_PLUS | {"vector": "magnitude"}),
    _loraplus("does_not_decay_b", ["outputs"], _VECTOR, "return lr * ratio, 0.0"),
    _loraplus("takes_a_matrix_of_one_row_for_a_vector", ["outputs"], _MATRIX,
        'if dimensions > 1 and rows > 1 and tensor != "lora_B":',
        "group_of(name, tensor.dim(), **rates)", "group_of(name, tensor.dim(), rows=len(tensor), **rates)",
        "lr_embedding: float, weight_decay: float\n", "lr_embedding: float, weight_decay: float, rows: int = 2\n",
        values=_PLUS | {"rank": 1}),
    _loraplus("trains_a_frozen_weight", ["outputs"], "if name in frozen:", "if name in list(frozen)[1:]:",
        "gradients[name], none", "gradients.get(name, tensor), none"),
    _loraplus("returns_the_rates_and_steps_with_one_rate", ["outputs"],
        '"lr": lr, "weight_decay": weight_decay, "betas"', '"lr": rates["lr"], "weight_decay": weight_decay, "betas"'),
]
# fmt: on
