"""Faults that show only where a size, a step or a number of adapters exceeds a limit, or where two settings meet."""

from __future__ import annotations

from harness.conformance.drawing.combinations import BEYOND_16_BITS
from harness.conformance.faults import line_fault

_UPDATE = 'apply_layer(lora.LoraLinear(dense_linear(W, bias), A, B, scaling, dropout=0.0), x, mask, {"A": A, "B": B})'
_LAYOUT = 'W_ED.T if kind_of(base) in ("Conv1D", "embedding") else W_ED'

# fmt: off
FAULTS = [
    line_fault("lora_linear", "adapts_only_65535_rows", ["outputs", "backward"], f"return {_UPDATE}",
        f"y, plain = {_UPDATE}, dense_linear(W, bias)(x)\n"
        "    rows = torch.arange(len(x)) < 65535\n    return torch.where(rows[:, None], y, plain)",
        values={"shape": [4, 4], "rows": [BEYOND_16_BITS], "rank": 3}),
    line_fault("nf4_dequantize", "decodes_only_65535_blocks", ["outputs"], "scale = absmax.float().",
        "scale = (absmax.float() * (torch.arange(len(absmax)) < 65535)).", file="dynamic_map",
        values={"shape": [BEYOND_16_BITS, 32], "block": 32}),
    line_fault("multi_lora_linear", "applies_only_eight_adapters", ["outputs", "backward"], "rows = (chosen == i)",
        "rows = ((chosen == i) & (i < 8))", file="multi_lora",
        values={"ids": [1, 0, -1, 1], "ranks": [3, 16], "shape": [24, 40], "distinct": 9}),
    line_fault("galore_step", "corrects_no_bias_after_1000_steps", ["outputs"], "    N: Tensor = correction",
        '    correction = correction if state["step"] <= 1000 else 1.0\n    N: Tensor = correction', file="galore",
        values={"shape": [24, 40], "rank": 3, "step": 1001, "beta2": 0.999}),
    line_fault("lora", "transposes_an_update_only_if_the_shapes_differ", ["merge"], _LAYOUT,
        "W_ED if W_ED.shape == base.weight.shape else W_ED.T", file="layers", layer="conv1d",
        values={"rank": 3, "alpha": 8.0}, inputs=32, outputs=32),
]
# fmt: on
