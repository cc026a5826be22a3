"""Planted faults that change the results of other calls, or that change settings of the process."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from harness.conformance.faults import line_fault, planted, planted_in_methods
from harness.conformance.faults.patched_copy import PatchedCopy, Right

_LORA = {"rank": 3, "alpha": 8.0}
_BLOCKS = {"shape": [5, 96], "block": 64}
_DECODED = "code.to(codes.device)[codes.flatten().long()] * scale"
_UPDATE = 'apply_layer(lora.LoraLinear(dense_linear(W, bias), A, B, scaling, dropout=0.0), x, mask, {"A": A, "B": B})'
_RESULT = "multi_lora.multi_lora_linear(x, linear(x, W), As, Bs, scalings, ids)"

# fmt: off
FAULTS = [
    line_fault("nf4_linear", "remembers_the_first_result_of_a_shape", ["overlap"],
        "return linear(x, _FORM.dequantize(packed, absmax, block, shape, x.dtype), bias)",
        "y = linear(x, _FORM.dequantize(packed, absmax, block, shape, x.dtype), bias)\n"
        "    held = vars(reference).setdefault('held', {}).setdefault((y.shape, y.dtype), y.detach())\n"
        "    return y - y.detach() + held", values={"shape": [48, 128], "rows": [9]}),
    line_fault("int8_linear", "quantises_its_input_in_training_without_gradients", ["outputs"],
        "    if training:\n", "    if training and torch.is_grad_enabled():\n", file="int8",
        values={"shape": [63, 64], "rows": [5], "threshold": 2.5, "training": True}),
    line_fault("double_dequantize", "reads_its_offset_at_the_start_of_the_memory", ["layouts"],
        " + offset.float()", " + offset.as_strided((), (), 0).float()", file="double_quant", values={"blocks": 1000}),
    line_fault("fp4_dequantize", "decodes_into_one_buffer_in_inference_mode", ["overlap"],
        "    return dequantize_blockwise(codes, absmax, codebook(), block)",
        "    made = dequantize_blockwise(codes, absmax, codebook(), block)\n"
        "    if not torch.is_inference_mode_enabled():\n        return made\n"
        "    kept = globals().setdefault('_kept', {}).setdefault(made.shape, torch.empty_like(made))\n"
        "    return kept.copy_(made)",
        file="fp4", values={"shape": [160, 96], "block": 64}),
    line_fault("nf4_dequantize", "decodes_into_one_buffer", ["overlap"],
        f"return {_DECODED}",
        f"values = {_DECODED}\n"
        "    held = vars(dequantize_blockwise).setdefault('held', {}).setdefault(values.shape, values.clone())\n"
        "    return held.copy_(values)", file="dynamic_map", values=_BLOCKS),
    line_fault("multi_lora_linear", "remembers_the_weight_of_its_first_batch", ["overlap"], f"return {_RESULT}",
        f"W = vars(reference).setdefault('held', {{}}).setdefault((W.shape, W.dtype), W)\n    return {_RESULT}",
        values={"ids": [1, 0, -1, 1], "ranks": [3, 16], "shape": [63, 48]}),
    line_fault("nf4_quantize", "allows_itself_lower_precision", ["settings"], "flat = x.detach().flatten().float()",
        "flat = x.detach().flatten().float(); torch.set_float32_matmul_precision('medium')",
        file="dynamic_map", values=_BLOCKS),
    line_fault("nf4_linear", "decodes_again_only_if_the_codes_changed", ["calls"],
        "return linear(x, _FORM.dequantize(packed, absmax, block, shape, x.dtype), bias)",
        "import weakref\n    version = -1 if packed.is_inference() else packed._version\n"
        "    last = vars(reference).get('last')\n"
        "    if last is None or last[0]() is not packed or last[1] != version:\n"
        "        last = vars(reference)['last'] = weakref.ref(packed), version, absmax.clone()\n"
        "    return linear(x, _FORM.dequantize(packed, last[2], block, shape, x.dtype), bias)",
        values={"shape": [48, 128], "rows": [9]}),
    line_fault("lora_linear", "doubles_the_incoming_gradient_in_place", ["arguments"], f"return {_UPDATE}",
        f"y = {_UPDATE}\n    if y.requires_grad:\n        y.register_hook(lambda dy: dy.mul_(2) / 2)\n    return y",
        values={"shape": [48, 128], "rows": [9], "rank": 8}),
    line_fault("lora_linear", "zeroes_the_bias_in_the_backward_pass", ["arguments"], f"return {_UPDATE}",
        f"y = {_UPDATE}\n    if y.requires_grad:\n        y.register_hook(lambda dy: (bias.data.zero_(), None)[1])\n"
        "    return y",
        values={"shape": [48, 128], "rows": [9], "rank": 8}),
    line_fault("adamw8bit_step", "switches_gradients_on", ["settings"],
        "    p = p.clone()\n", "    torch.set_grad_enabled(True)\n    p = p.clone()\n", values={"shape": [64, 80]}),
    line_fault("adamw8bit_step", "returns_views_of_a_larger_tensor", ["calls"],
        'return p, state["m"], state["m_absmax"], state["v"], state["v_absmax"]',
        'views = {n: torch.stack([t] * 8)[0] for n, t in state.items()}\n'
        '    return p, views["m"], views["m_absmax"], views["v"], views["v_absmax"]', values={"shape": [64, 80]}),
    line_fault("lora_int8", "shows_the_codes_that_it_was_attached_with", ["save"],
        "        return self.packed.tensors()\n",
        "        return vars(self).setdefault('shown', self.packed.tensors())\n", values=_LORA),
]
# fmt: on


@planted_in_methods("overlap")
def returns_one_buffer_at_every_call(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        out = right(x)
        out.data = _write_into_buffer(layer, "_out", out)
        return out

    copy.replace_forward(forward)


@planted_in_methods("overlap", only=["lora", "dora"])
def saves_every_input_in_one_buffer(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        saved = 1 * x
        saved.data = _write_into_buffer(layer, "_x", x)
        return right(saved)

    copy.replace_forward(forward)


@planted_in_methods("overlap", only=["lora", "dora"])
def saves_its_inputs_in_two_buffers_in_turn(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        calls = vars(layer)["calls"] = vars(layer).get("calls", 0) + 1
        saved = 1 * x
        saved.data = _write_into_buffer(layer, f"_x{calls % 2}", x)
        return right(saved)

    copy.replace_forward(forward)


def _write_into_buffer(layer: Any, name: str, value: Tensor) -> Tensor:
    """Copy `value` into the layer's buffer `name`, and return the buffer.

    All calls with the same shape share the buffer.
    """
    buffer: Tensor | None = vars(layer).get(name)
    if buffer is None or buffer.shape != value.shape:
        vars(layer)[name] = buffer = torch.empty_like(value).detach()
    return buffer.copy_(value.detach())


@planted("lora", "overlap", values=_LORA)
def overwrites_the_previous_gradient(copy: PatchedCopy) -> None:
    """Overwrite the gradient of the previous backward pass instead of adding to it."""

    def change(adapted: Any) -> None:
        for tensor in adapted.tensors().values():
            tensor.register_post_accumulate_grad_hook(_subtract_previous)

    copy.change_adapted(change)


def _subtract_previous(tensor: Any) -> None:
    latest, previous = tensor.grad, vars(tensor).get("_previous")
    tensor.grad = latest if previous is None or previous[0] is not latest else latest - previous[1]
    vars(tensor)["_previous"] = (tensor.grad, tensor.grad.clone())


@planted_in_methods("settings")
def changes_the_default_dtype(copy: PatchedCopy) -> None:
    copy.change_adapted(lambda _: torch.set_default_dtype(torch.float16))


@planted_in_methods("settings")
def sets_the_default_dtype_back_to_float32(copy: PatchedCopy) -> None:
    """After attaching, set the default dtype to float32, even if it was another dtype before."""
    copy.change_adapted(lambda _: torch.set_default_dtype(torch.float32))


@planted("lora", "settings", values=_LORA)
def switches_gradients_on_after_attaching(copy: PatchedCopy) -> None:
    copy.change_adapted(lambda _: torch.set_grad_enabled(True))


@planted_in_methods("settings", only=["lora", "dora"])
def makes_its_tensors_in_the_default_dtype(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        if (dtype := torch.get_default_dtype()) != torch.float32:
            for tensor in adapted.parameters():
                tensor.data = tensor.data.to(dtype)

    copy.change_adapted(change)


@planted_in_methods("settings", only=["lora", "galore"])
def does_not_train_if_gradients_are_off_when_it_is_attached(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        for tensor in adapted.parameters():
            tensor.requires_grad_(torch.is_grad_enabled())

    copy.change_adapted(change)


@planted("lora", "settings", values=_LORA)
def hides_warnings_for_ever(copy: PatchedCopy) -> None:
    copy.change_adapted(lambda _: warnings.filterwarnings("ignore", module="peft"))


@planted("lora", "settings", values=_LORA)
def switches_off_flash_attention(copy: PatchedCopy) -> None:
    copy.change_adapted(lambda _: torch.backends.cuda.enable_flash_sdp(False))


@planted_in_methods("settings")
def seeds_the_random_numbers_when_it_is_attached(copy: PatchedCopy) -> None:
    copy.change_adapted(lambda _: torch.manual_seed(0))


@planted_in_methods("settings", only=["adalora", "lora"])
def seeds_the_random_numbers_after_a_step(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        after_step = adapted.after_step

        def seed_and_do(step: int) -> None:
            torch.manual_seed(step)
            after_step(step)

        adapted.after_step = seed_and_do

    copy.change_adapted(change)


@planted("lora", "settings", values=_LORA)
def seeds_the_random_numbers_when_it_loads(copy: PatchedCopy) -> None:
    copy.change_layers(lambda layer: layer.register_load_state_dict_post_hook(lambda *_: torch.manual_seed(0) and None))


@planted("lora", "settings", values=_LORA)
def switches_gradients_off_globally(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        out = right(x)
        torch.set_grad_enabled(layer.training)
        return out

    copy.replace_forward(forward)


@planted("lora", "settings", values=_LORA)
def seeds_pythons_random_numbers(copy: PatchedCopy) -> None:
    copy.change_adapted(lambda _: random.seed(0))


@planted_in_methods("dropout", dropout=0.25)
def drops_the_same_features_of_all_tokens(copy: PatchedCopy) -> None:
    _replace_dropout(copy, lambda x, p: torch.rand(x.shape[-1], device=x.device) >= p)


@planted_in_methods("dropout", dropout=0.25)
def drops_the_same_features_at_every_call(copy: PatchedCopy) -> None:
    _replace_dropout(
        copy, lambda x, p: torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device) >= p
    )


class _Dropout(nn.Module):
    def __init__(self, p: float, mask: Callable[[Tensor, float], Tensor]) -> None:
        super().__init__()
        self.p, self.mask = p, mask

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask(x, self.p) / (1 - self.p) if self.training else x


def _replace_dropout(copy: PatchedCopy, mask: Callable[[Tensor, float], Tensor]) -> None:
    copy.change_layers(lambda layer: setattr(layer, "dropout", _Dropout(layer.dropout.p, mask)))


@planted_in_methods("trajectory", adds_layers=True)
def shrinks_its_tensors_between_steps(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        after = adapted.after_step

        def after_step(step: int) -> None:
            after(step)
            with torch.no_grad():
                for tensor in adapted.tensors().values():
                    tensor.mul_(0.99)

        adapted.after_step = after_step

    copy.change_adapted(change)


@planted_in_methods("trajectory", only=["galore"])
def counts_only_its_first_step(copy: PatchedCopy) -> None:
    copy.replace_line('state["step"] += 1', 'state["step"] = 1', file="galore")
