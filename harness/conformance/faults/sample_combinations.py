"""Planted faults that show only above a certain size, step or number of adapters, or only with two settings together."""

from __future__ import annotations

from harness.conformance.drawing.combinations import BEYOND_16_BITS, BEYOND_20_BITS
from harness.conformance.drawing.factors import BEYOND_8_BITS, WIDEST
from harness.conformance.faults import line_fault

_UPDATE = 'apply_layer(lora.LoraLinear(dense_linear(W, bias), A, B, scaling, dropout=0.0), x, mask, {"A": A, "B": B})'
_INPUTS, _OUTPUTS = BEYOND_20_BITS
_LAYOUT = 'W_ED.T if kind_of(base) in ("Conv1D", "embedding") else W_ED'

# fmt: off
FAULTS = [
    line_fault("lora_linear", "adapts_only_65535_rows", ["outputs", "backward"], f"return {_UPDATE}",
        f"y, plain = {_UPDATE}, dense_linear(W, bias)(x)\n"
        "    rows = torch.arange(len(x)) < 65535\n    return torch.where(rows[:, None], y, plain)",
        values={"shape": [4, 4], "rows": [BEYOND_16_BITS], "rank": 3}),
    line_fault("lora_linear", "forgets_the_mask_where_the_scaling_is_one", ["outputs"], f"return {_UPDATE}",
        f"mask = None if scaling == 1 else mask\n    return {_UPDATE}",
        values={"shape": [24, 40], "rows": [17], "rank": 3, "scaling": 1.0, "dropout": 0.25}),
    line_fault("nf4_dequantize", "decodes_only_65535_blocks", ["outputs"], "scale = absmax.float().",
        "scale = (absmax.float() * (torch.arange(len(absmax)) < 65535)).", file="dynamic_map",
        values={"shape": [BEYOND_16_BITS, 32], "block": 32}),
    line_fault("multi_lora_linear", "marks_adapters_in_a_mask_of_32_bits", ["outputs", "backward"],
        "rows = (chosen == i)", "rows = ((chosen == i) & (chosen < 32))",
        file="multi_lora", values={"ids": [0], "ranks": [1, 2], "shape": [16, 12], "tokens": 2, "distinct": 40}),
    line_fault("lora", "ignores_rslora_in_a_convolution", ["forward", "merge"],
        "return LoraConv(base, A.view(R, C, *K), B, s, p, bias(E))",
        "return LoraConv(base, A.view(R, C, *K), B, config.alpha / R, p, bias(E))",
        layer="conv2d", values={"rank": 4, "alpha": 10.0, "rslora": True}),
    line_fault("lora", "pads_every_convolution_by_reflection", ["forward"], "mode=base.padding_mode", 'mode="reflect"',
        file="lora_layers", layer="conv2d-reflect", values={"rank": 4, "alpha": 10.0}),
    line_fault("pissa", "forgets_the_scaling_of_a_fast_start", ["principal"],
        "root = (S / scaling).sqrt()", "root = (S / (1.0 if config.niter else scaling)).sqrt()",
        values={"rank": 16, "alpha": 20.0, "niter": 4}),
    line_fault("multi_lora_linear", "applies_only_eight_adapters", ["outputs", "backward"], "rows = (chosen == i)",
        "rows = ((chosen == i) & (i < 8))", file="multi_lora",
        values={"ids": [1, 0, -1, 1], "ranks": [3, 16], "shape": [24, 40], "distinct": 9}),
    line_fault("dora", "merges_rows_for_columns_if_the_shapes_allow_it", ["merge"],
        'g[:, None] * V_ED if self.per == "output" else V_ED * g',
        'g[:, None] * V_ED if self.per == "output" or len(set(V_ED.shape)) == 1 else V_ED * g',
        values={"rank": 3, "alpha": 8.0, "per": "input"}, inputs=32, outputs=32),
    line_fault("multi_lora_linear", "counts_adapters_in_8_bits", ["outputs", "backward"], "rows = (chosen == i)",
        "rows = (chosen % 256 == i)", file="multi_lora",
        values={"ids": [1, 0, -1, 1], "ranks": [3, 16], "shape": [24, 40], "distinct": BEYOND_8_BITS}),
    line_fault("lora_experts", "serves_64_tokens_per_expert", ["outputs", "backward"],
        "token, n = torch.where(chosen == k)", "token, n = (found[:64] for found in torch.where(chosen == k))",
        file="lora_experts", values={"shape": [24, 40], "experts": 1, "rank": 3, "tokens": 130}),
    line_fault("dora_linear", "adds_up_the_squares_of_8192_columns", ["outputs"],
        "torch.linalg.vector_norm(V_ED,", "torch.linalg.vector_norm(V_ED[:, :8192],", file="dora",
        values={"shape": [3, WIDEST], "rows": [17], "rank": 3}),
    line_fault("lora", "keeps_token_numbers_in_16_bits", ["forward"], "            ids_T, self.A.T,",
        "            ids_T.short().long() % self.A.shape[1], self.A.T,", file="lora_layers", layer="embedding",
        values={"rank": 3, "alpha": 8.0}, inputs=BEYOND_16_BITS, outputs=8),
    line_fault("galore_step", "corrects_no_bias_after_1000_steps", ["outputs"], "    N: Tensor = correction",
        '    correction = correction if state["step"] <= 1000 else 1.0\n    N: Tensor = correction', file="galore",
        values={"shape": [24, 40], "rank": 3, "step": 1001, "beta2": 0.999}),
    line_fault("lora", "transposes_an_update_only_if_the_shapes_differ", ["merge"], _LAYOUT,
        "W_ED if W_ED.shape == base.weight.shape else W_ED.T", file="layers", layer="conv1d",
        values={"rank": 3, "alpha": 8.0}, inputs=32, outputs=32),
    line_fault("loha", "computes_only_whole_pieces_of_a_large_update", ["forward", "gradient", "merge"],
        "return self.scaling * ((self.B1 @ self.A1) * (self.B2 @ self.A2))",
        "update = self.scaling * ((self.B1 @ self.A1) * (self.B2 @ self.A2))\n"
        "        if update.numel() > 2**20:\n            update[len(update) // 1024 * 1024 :] *= 0\n        return update",
        values={"rank": 3, "alpha": 40.7}, inputs=_INPUTS, outputs=_OUTPUTS),
    line_fault("nf4_quantize", "quantises_in_pieces_of_a_million", ["outputs"],
        "return quantize_blockwise(W, codebook(), block)",
        "pieces = [quantize_blockwise(one, codebook(), block) for one in W.flatten().split(1_000_000)]\n"
        "    return torch.cat([one for one, _ in pieces]), torch.cat([one for _, one in pieces])",
        file="nf4", values={"shape": BEYOND_20_BITS, "block": 256}),
    # Step through the numbers as if each had 64 bits.
    line_fault("lora_experts", "reads_every_second_number_of_32_bits", ["outputs"],
        "for k in chosen.unique().tolist():",
        "if chosen.dtype == torch.int32:\n"
        "        chosen = chosen.flatten().repeat(2)[::2].view_as(chosen)\n    for k in chosen.unique().tolist():",
        file="lora_experts", values={"shape": [18, 10], "experts": 3, "rank": 2, "index": "int32"}),
    line_fault("lora_experts", "adds_up_four_experts_per_token", ["outputs", "backward"],
        "token, n = torch.where(chosen == k)", "token, n = torch.where(chosen[:, :4] == k)",
        file="lora_experts", values={"shape": [24, 40], "experts": 8, "rank": 3, "tokens": 7, "chosen": 6}),
    line_fault("lamb8bit_step", "bounds_its_trust_ratio_by_10", ["outputs"],
        "ratio = wide.norm() / update.norm()", "ratio = (wide.norm() / update.norm()).clamp(max=10)",
        file="lamb8bit", values={"shape": [64, 80], "parameter": "large"}),
    line_fault("riemannian_lora_step", "stops_at_a_layer_without_gradients", ["outputs"],
        "        for one in riemannian_step(\n            optimizer, A, B, (gA, gB),",
        "        ran = gAs[0] is not None\n        for one in riemannian_step(\n"
        "            optimizer, A, B, (gA, gB) if ran else (None, None),",
        values={"shape": [24, 40], "ranks": [3, 4], "unused": "first"}),
    line_fault("loraplus_groups", "takes_gradients_in_the_order_of_the_tensors", ["outputs"],
        "    for name, tensor in tensors.items():\n",
        "    trained = [name for name in tensors if name not in frozen]\n"
        "    gradients = dict(zip(trained, gradients.values()))\n    for name, tensor in tensors.items():\n",
        file="loraplus", values={"layers": 2, "width": 8, "rank": 3, "order": "gradients rotated"}),
    line_fault("loraplus_groups", "takes_what_follows_an_A_for_its_B", ["outputs"],
        "    for name, tensor in tensors.items():\n",
        "    names = list(tensors)\n"
        "    after = [b for a, b in zip(names, names[1:]) if a.endswith('lora_A')]\n"
        "    for name, tensor in tensors.items():\n        rates['follows'] = name in after\n",
        "name: str, dimensions: int, *,", "name: str, dimensions: int, *, follows: bool,",
        'dimensions > 1 and tensor != "lora_B"', "dimensions > 1 and not follows",
        file="loraplus", values={"layers": 2, "width": 8, "rank": 3, "order": "reversed"}),
    line_fault("lora_qkv", "takes_the_next_bias_for_a_missing_one", ["outputs"],
        "bias, m = None if biases is None else biases[at],",
        "there = [b for b in biases or () if b is not None]\n"
        "        bias, m = there[min(at, len(there) - 1)] if there else None,",
        values={"shape": [48, 40], "rows": [7], "ranks": [3, 4, 2], "groups": 2, "key_bias": False}),
]
# fmt: on
