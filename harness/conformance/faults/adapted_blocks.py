"""Planted faults of the Operations that compute several adapted layers: lora_qkv and lora_mlp."""

from __future__ import annotations

from functools import partial

from harness.conformance.faults import line_fault

_PLAIN = {"shape": [24, 40], "rows": [9], "ranks": [3, 3, 3]}
_DORA = {**_PLAIN, "dora": True}
_GELU = {**_PLAIN, "activation": "gelu"}
_LAYER = "adapted_linear(x, Ws[at], bias, As[at], Bs[at], scalings[at], m)"
_OUTPUTS = "layer(0), layer(1), layer(2)"
_BIAS = "None if biases is None else biases[at]"
_MAGNITUDE = "None if ms is None else ms[at]"
_FIRST_TWO = "gate, up = layer(x, 0), layer(x, 1)"
_HIDDEN = "layer(_FUNCTIONS[activation](gate) * up, 2)"
_JOIN = """class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *ys):
        return tuple(y.clone() for y in ys)
    @staticmethod
    def backward(ctx, *dys):
        return dys if all(bool(dy.any()) for dy in dys) else tuple(0 * dy for dy in dys)

OPERATION = """
_KEPT = """class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.slope = torch.ones_like(x)
        return x.clone()
    @staticmethod
    def backward(ctx, dy):
        dx = dy * ctx.slope
        ctx.slope.mul_(2)
        return dx

OPERATION = """

_qkv = partial(line_fault, "lora_qkv", values=_PLAIN)
_mlp = partial(line_fault, "lora_mlp", values=_PLAIN)

# fmt: off
FAULTS = [
    _qkv("swaps_k_and_v", ["outputs"], _OUTPUTS, "layer(0), layer(2), layer(1)"),
    _qkv("applies_the_first_adapter_to_all", ["outputs", "backward"],
        _LAYER, _LAYER.replace("As[at], Bs[at]", "As[0], Bs[0]")),
    _qkv("scales_all_updates_as_the_first", ["outputs", "backward"], _LAYER, _LAYER.replace("scalings[at]", "scalings[0]")),
    _qkv("adds_the_bias_of_q_to_all", ["outputs"], _BIAS, "None if biases is None else biases[0]"),
    _qkv("forgets_the_biases", ["outputs"], _BIAS, "None"),
    # Give dx of q and k only, as if v were computed from a constant.
    _qkv("leaves_v_out_of_the_gradient_of_x", ["backward"], _LAYER, _LAYER.replace("(x", "(x if at < 2 else x.detach()")),
    _qkv("trains_the_first_layer_only", ["backward"],
        _LAYER, _LAYER.replace("As[at], Bs[at]", "*((As[0], Bs[0]) if at < 1 else (As[at].detach(), Bs[at].detach()))")),
    _qkv("ignores_the_magnitudes", ["outputs", "backward"], _MAGNITUDE, "None", values=_DORA),
    _qkv("takes_the_magnitudes_of_q_for_all", ["outputs", "backward"],
        _MAGNITUDE, "None if ms is None else ms[0]", values=_DORA),
    # Return gradients only if every output gets one.
    _qkv("needs_all_outputs_in_use", ["calls"], _OUTPUTS, f"_Join.apply({_OUTPUTS})", "OPERATION = ", _JOIN),
    _mlp("activates_the_wrong_layer", ["outputs", "backward"], _HIDDEN, "layer(gate * _FUNCTIONS[activation](up), 2)"),
    _mlp("adds_instead_of_gating", ["outputs", "backward"], _HIDDEN, "layer(_FUNCTIONS[activation](gate) + up, 2)"),
    _mlp("leaves_the_activation_out", ["outputs", "backward"], _HIDDEN, "layer(gate * up, 2)"),
    _mlp("has_one_kind_of_gelu", ["outputs", "backward"], '"gelu": gelu,', '"gelu": partial(gelu, approximate="tanh"),',
        values=_GELU),
    _mlp("takes_silu_for_gelu", ["outputs", "backward"], '"gelu": gelu,', '"gelu": silu,', values=_GELU),
    # The derivative of the cube is infinite in float16, and that of tanh is 0.
    _mlp("computes_the_cube_of_gelu_in_float16", ["backward"], '"gelu-tanh": partial(gelu, approximate="tanh"),',
        '"gelu-tanh": lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x * x * x))),',
        values={**_PLAIN, "activation": "gelu-tanh", "gate": "large"}, dtype="float16"),
    _mlp("leaves_out_the_update_of_down", ["outputs", "backward"],
        _HIDDEN, "torch.nn.functional.linear(_FUNCTIONS[activation](gate) * up, Ws[2])"),
    _mlp("gives_up_the_adapter_of_gate", ["outputs", "backward"],
        _FIRST_TWO, "gate, up = layer(x, 0), adapted_linear(x, Ws[1], None, As[0], Bs[0], scalings[1], None)"),
    # Leave out the second term of the derivative of silu, x s (1 - s).
    _mlp("takes_sigmoid_for_the_slope_of_silu", ["backward"], '"silu": silu,',
        '"silu": lambda x: silu(x).detach() + x.sigmoid().detach() * (x - x.detach()),'),
    _mlp("passes_no_gradient_through_gate", ["backward"], "(gate) * up", "(gate).detach() * up"),
    _mlp("trains_down_only", ["backward"], "(gate) * up, 2)", "(gate).detach() * up.detach(), 2)"),
    _mlp("leaves_gate_out_of_the_gradient_of_x", ["backward"], _FIRST_TWO, "gate, up = layer(x.detach(), 0), layer(x, 1)"),
    _mlp("forgets_the_bias_of_down", ["outputs"],
        _BIAS, "None if biases is None or at == 2 else biases[at]", values={**_PLAIN, "bias": True}),
    _mlp("ignores_the_magnitude_of_down", ["outputs", "backward"],
        _MAGNITUDE, "None if ms is None or at == 2 else ms[at]", values=_DORA),
    # Overwrite a saved tensor in the backward pass, as kernels that work in place do.
    _mlp("overwrites_what_it_saved", ["calls"], "(gate) * up, 2)", "(_Kept.apply(gate)) * up, 2)", "OPERATION = ", _KEPT),
    # Write the gradient of x over x, to save memory.
    _mlp("writes_the_gradient_over_its_input", ["arguments"], "return layer(_F",
        "if x.requires_grad:\n        x.register_hook(lambda dx: x.data.copy_(dx) * 0 + dx)\n    return layer(_F"),
    _mlp("scales_its_input_in_place", ["arguments"], _FIRST_TWO, f"{_FIRST_TWO}\n    x.data.mul_(2)"),
]
# fmt: on
