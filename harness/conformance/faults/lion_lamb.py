"""Planted faults of Lion and LAMB with 8-bit moments."""

from __future__ import annotations

from functools import partial

from harness.conformance.faults import line_fault

_CASE = {"shape": [64, 80], "weight_decay": 0.5}
_SPARSE = {"shape": [4096], "gradient": "sparse", "weight_decay": 0.5}
_SUM = "(betas[0] * moment + (1 - betas[0]) * wide).sign()"
_STEP = "after = (1 - lr * weight_decay) * p.to(dtype) - lr * direction"
_RATIO = "torch.where((wide.norm() == 0) | (update.norm() == 0), 1.0, ratio)"
_DECAY = " + weight_decay * wide\n"

_lion = partial(line_fault, "lion8bit_step", file="lion8bit", values=_CASE)
_lamb = partial(line_fault, "lamb8bit_step", file="lamb8bit", values=_CASE)

# fmt: off
FAULTS = [
    # bitsandbytes#1992: the decay is added to the gradient.
    _lion("decays_inside_the_sign", ["outputs"],
        "    direction = (", "    wide = wide + weight_decay * p.to(dtype)\n    direction = (",
        _STEP, "after = p.to(dtype) - lr * direction"),
    _lion("forgets_the_sign", ["outputs"], _SUM, _SUM.removesuffix(".sign()")),
    _lion("takes_the_sign_of_the_new_moment", ["outputs"], _SUM, "(betas[1] * moment + (1 - betas[1]) * wide).sign()"),
    _lion("takes_the_sign_of_the_gradient", ["outputs"], _SUM, "wide.sign()"),
    _lion("moves_weights_without_a_gradient", ["outputs"],
        "direction = (betas[0] * moment", "direction = (1e-30 + betas[0] * moment", values=_SPARSE),
    _lion("keeps_the_moment_of_the_first_beta", ["output_codes"], "betas[1] * moment + (1 - betas[1]) * wide",
        "betas[0] * moment + (1 - betas[0]) * wide"),
    _lion("keeps_its_moment", ["output_codes"], "betas[1] * moment + (1 - betas[1]) * wide", "moment"),
    _lion("keeps_the_direction_as_its_moment", ["output_codes"], "betas[1] * moment + (1 - betas[1]) * wide", "direction"),
    _lion("encodes_with_the_unsigned_map", ["output_codes"],
        "codes, absmax = quantize_blockwise(betas[1] * moment + (1 - betas[1]) * wide, levels, BLOCK)",
        "codes, absmax = quantize_blockwise(betas[1] * moment + (1 - betas[1]) * wide, dynamic_map(False), BLOCK)"),
    _lion("decays_after_the_step", ["outputs"], _STEP, "after = (1 - lr * weight_decay) * (p.to(dtype) - lr * direction)"),
    _lion("starts_blocks_with_rows", ["output_codes"],
        "to(dtype).view(p.shape)", "to(dtype).view(p.shape[::-1]).T"),

    # bitsandbytes 0.50.2: LAMB8bit is AdamW8bit.
    _lamb("has_no_trust_ratio", ["outputs"], _RATIO, "1.0"),
    # The 32-bit LAMB of bitsandbytes: only a long update is scaled.
    _lamb("only_shortens_updates", ["outputs"], _RATIO, f"{_RATIO}.clamp(max=1.0)",
        values={"shape": [64, 80], "eps": 1.0}),
    _lamb("takes_the_ratio_of_each_row", ["outputs"], "ratio = wide.norm() / update.norm()",
        "ratio = wide.norm(dim=-1, keepdim=True) / update.norm(dim=-1, keepdim=True)"),
    _lamb("inverts_the_trust_ratio", ["outputs"], "ratio = wide.norm() / update.norm()",
        "ratio = update.norm() / wide.norm()"),
    _lamb("takes_the_ratio_before_the_decay", ["outputs"], _DECAY, "\n",
        f"* {_RATIO} * update", f"* {_RATIO} * (update + weight_decay * wide)"),
    _lamb("decays_outside_the_trust_ratio", ["outputs"], _DECAY, "\n",
        "    wide = wide - lr *", "    wide = (1 - lr * weight_decay) * wide - lr *"),
    _lamb("forgets_the_bias_correction", ["outputs"], "m / (1 - betas[0] ** step) / ", "m / ",
        values={"shape": [64, 80], "step": 2, "weight_decay": 0.5}),
    _lamb("encodes_the_second_moment_with_signs", ["output_codes"], '("v", v, False)', '("v", v, True)'),
    _lamb("stores_the_corrected_moment", ["outputs"], '("m", m, True)', '("m", m / (1 - betas[0] ** step), True)'),
]
# fmt: on
