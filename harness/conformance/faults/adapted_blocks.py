"""Faults of the Operations that compute several adapted layers: lora_qkv and lora_mlp."""

from __future__ import annotations

from functools import partial

from harness.conformance.faults import line_fault

_PLAIN = {"shape": [24, 40], "rows": [9], "ranks": [3, 3, 3]}
_DORA = {**_PLAIN, "dora": True}
_LAYER = (
    "x, Ws[at], None if biases is None else biases[at], As[at], Bs[at], scalings[at], None if ms is None else ms[at]"
)
_HIDDEN = "layer(_FUNCTIONS[activation](gate) * up, 2)"

_qkv = partial(line_fault, "lora_qkv", values=_PLAIN)
_mlp = partial(line_fault, "lora_mlp", values=_PLAIN)

# fmt: off
FAULTS = [
    _qkv("swaps_k_and_v", ["outputs"], "for at in range(3)", "for at in (0, 2, 1)"),
    _qkv("applies_the_first_adapter_to_all", ["outputs", "backward"],
        _LAYER, _LAYER.replace("As[at], Bs[at]", "As[0], Bs[0]")),
    _qkv("scales_all_updates_as_the_first", ["outputs", "backward"], _LAYER, _LAYER.replace("scalings[at]", "scalings[0]")),
    _qkv("adds_the_bias_of_q_to_all", ["outputs"], _LAYER, _LAYER.replace("biases[at]", "biases[0]")),
    _qkv("forgets_the_biases", ["outputs"], _LAYER, _LAYER.replace("biases[at]", "None")),
    # Give dx of q and k only, as if v were computed from a constant.
    _qkv("leaves_v_out_of_the_gradient_of_x", ["backward"], _LAYER, _LAYER.replace("x, ", "x if at < 2 else x.detach(), ", 1)),
    _qkv("trains_the_first_output_only", ["backward"],
        _LAYER, _LAYER.replace("As[at], Bs[at]", "As[at] if at < 1 else As[at].detach(), Bs[at] if at < 1 else Bs[at].detach()")),
    _qkv("ignores_the_magnitudes", ["outputs", "backward"],
        "None if ms is None else ms[at]", "None", values=_DORA),
    _qkv("takes_the_magnitudes_of_q_for_all", ["outputs", "backward"],
        "None if ms is None else ms[at]", "None if ms is None else ms[0]", values=_DORA),
    # Return gradients only if all outputs get one.
    _qkv("needs_all_outputs_in_use", ["calls"], "return tuple(", "return _joined(", "OPERATION =",
        "class _Join(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, *ys):\n        return tuple(y.clone() for y in ys)\n"
        "    @staticmethod\n"
        "    def backward(ctx, *dys):\n"
        "        return dys if all(bool(dy.any()) for dy in dys) else tuple(0 * dy for dy in dys)\n"
        "def _joined(ys):\n    return _Join.apply(*ys)\n\nOPERATION ="),
    _mlp("activates_the_wrong_layer", ["outputs", "backward"], _HIDDEN, "layer(gate * _FUNCTIONS[activation](up), 2)"),
    _mlp("adds_instead_of_gating", ["outputs", "backward"], _HIDDEN, "layer(_FUNCTIONS[activation](gate) + up, 2)"),
    _mlp("leaves_the_activation_out", ["outputs", "backward"], _HIDDEN, "layer(gate * up, 2)"),
    _mlp("has_one_kind_of_gelu", ["outputs", "backward"], '"gelu": gelu,', '"gelu": partial(gelu, approximate="tanh"),',
        values={**_PLAIN, "activation": "gelu"}),
    _mlp("takes_silu_for_gelu", ["outputs", "backward"], '"gelu": gelu,', '"gelu": silu,',
        values={**_PLAIN, "activation": "gelu"}),
    _mlp("leaves_out_the_update_of_down", ["outputs", "backward"], _HIDDEN,
        "torch.nn.functional.linear(_FUNCTIONS[activation](gate) * up, Ws[2])"),
    _mlp("gives_up_the_adapter_of_gate", ["outputs", "backward"], "layer(x, 0), layer(x, 1)",
        "layer(x, 0), adapted_linear(x, Ws[1], None, As[0], Bs[0], scalings[1], None)"),
    # The derivative of silu without its second term, s (1 - s) x.
    _mlp("takes_sigmoid_for_the_slope_of_silu", ["backward"], '"silu": silu,',
        '"silu": lambda x: silu(x).detach() + x.sigmoid().detach() * (x - x.detach()),'),
    _mlp("passes_no_gradient_through_gate", ["backward"], "(gate) * up", "(gate).detach() * up"),
    _mlp("trains_down_only", ["backward"], "(gate) * up, 2)", "(gate).detach() * up.detach(), 2)"),
    _mlp("leaves_gate_out_of_the_gradient_of_x", ["backward"], "layer(x, 0), layer(x, 1)", "layer(x.detach(), 0), layer(x, 1)"),
    _mlp("forgets_the_bias_of_down", ["outputs"], "None if biases is None else biases[at]",
        "None if biases is None or at == 2 else biases[at]", values={**_PLAIN, "bias": True}),
    _mlp("ignores_the_magnitude_of_down", ["outputs", "backward"], "None if ms is None else ms[at]",
        "None if ms is None or at == 2 else ms[at]", values={**_PLAIN, "dora": True}),
    # Overwrite the saved gate in the backward pass, as kernels that work in place do.
    _mlp("overwrites_what_it_saved", ["calls"], "(gate) * up, 2)", "(_Kept.apply(gate)) * up, 2)", "OPERATION =",
        "class _Kept(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, x):\n        ctx.x = torch.ones_like(x)\n        return x.clone()\n"
        "    @staticmethod\n"
        "    def backward(ctx, dy):\n        dx = dy * ctx.x\n        ctx.x.mul_(2)\n        return dx\n\nOPERATION ="),
    # Write the gradient of x over x, to save memory.
    _mlp("writes_the_gradient_over_its_input", ["arguments"], "return layer(_F",
        "if x.requires_grad:\n        x.register_hook(lambda dx: x.data.copy_(dx) * 0 + dx)\n    return layer(_F"),
    _mlp("activates_in_place", ["arguments"], "gate, up = layer(x, 0), layer(x, 1)",
        "gate, up = layer(x, 0), layer(x, 1)\n    x.data.mul_(2)"),
]
# fmt: on
