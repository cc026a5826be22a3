"""Faults in the effects of a call on other calls and on the process."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from harness.conformance.faults import planted, planted_in_methods
from harness.conformance.faults.patched_copy import PatchedCopy

Right = Callable[[Tensor], Tensor]
_BLOCKS = {"values": {"shape": [5, 96], "block": 64}}
_LAYER = {"values": {"shape": [48, 128], "rows": [9]}}
_BATCH = {"values": {"ids": [1, 0, -1, 1], "ranks": [3, 16], "shape": [63, 48]}}
_DECODED = "return code.to(codes.device)[codes.flatten().long()] * scale"


@planted_in_methods("overlap")
def returns_the_same_buffer_at_every_call(its: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        out = right(x)
        out.data = _in_place_of_the_last(layer, "_out", out)
        return out

    its.forward(forward)


@planted_in_methods("overlap", only=["lora", "dora"])
def keeps_its_input_for_the_backward_pass_in_one_place(its: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        kept = 1 * x
        kept.data = _in_place_of_the_last(layer, "_x", x)
        return right(kept)

    its.forward(forward)


def _in_place_of_the_last(layer: Any, name: str, value: Tensor) -> Tensor:
    held = vars(layer).get(name)
    if held is None or held.shape != value.shape:
        vars(layer)[name] = held = torch.empty_like(value).detach()
    held.copy_(value.detach())
    return held  # type: ignore[no-any-return]


@planted("lora", "overlap", values={"rank": 3, "alpha": 8.0})
def forgets_the_gradient_of_before(its: PatchedCopy) -> None:
    """Overwrite the gradient instead of adding to it."""

    def change(adapted: Any) -> None:
        for tensor in adapted.tensors().values():
            tensor.register_post_accumulate_grad_hook(_last_only)

    its.then(change)


def _last_only(tensor: Any) -> None:
    latest, held = tensor.grad, vars(tensor).get("_held")
    tensor.grad = latest if held is None or held[0] is not latest else latest - held[1]
    vars(tensor)["_held"] = (tensor.grad, tensor.grad.clone())


@planted("nf4_linear", "overlap", **_LAYER)
def remembers_the_first_result_of_a_shape(its: PatchedCopy) -> None:
    its.line(
        "return linear(x, _FORM.dequantize(packed, absmax, block, shape, x.dtype), bias)",
        "y = linear(x, _FORM.dequantize(packed, absmax, block, shape, x.dtype), bias)\n"
        "    held = vars(reference).setdefault('held', {}).setdefault((y.shape, y.dtype), y.detach())\n"
        "    return y - y.detach() + held",
    )


@planted("nf4_dequantize", "overlap", **_BLOCKS)
def decodes_into_one_buffer(its: PatchedCopy) -> None:
    its.line(
        _DECODED,
        f"{_DECODED.replace('return', 'values =')}\n"
        "    held = vars(dequantize_blockwise).setdefault('held', {}).setdefault(values.shape, values.clone())\n"
        "    return held.copy_(values)",
        file="dynamic_map",
    )


@planted("multi_lora_linear", "overlap", **_BATCH)
def keeps_the_weight_of_its_first_batch(its: PatchedCopy) -> None:
    its.line(
        "return multi_lora.multi_lora_linear(x, linear(x, W), As, Bs, scalings, ids)",
        "W = vars(reference).setdefault('held', {}).setdefault((W.shape, W.dtype), W)\n"
        "    return multi_lora.multi_lora_linear(x, linear(x, W), As, Bs, scalings, ids)",
    )


@planted_in_methods("settings")
def changes_the_default_dtype(its: PatchedCopy) -> None:
    its.then(lambda _: torch.set_default_dtype(torch.float16))


@planted_in_methods("settings")
def seeds_the_random_numbers_when_it_is_attached(its: PatchedCopy) -> None:
    its.then(lambda _: torch.manual_seed(0))


@planted("lora", "settings", values={"rank": 3, "alpha": 8.0})
def switches_gradients_off_for_all(its: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        out = right(x)
        torch.set_grad_enabled(layer.training)
        return out

    its.forward(forward)


@planted("lora", "settings", values={"rank": 3, "alpha": 8.0})
def seeds_pythons_random_numbers(its: PatchedCopy) -> None:
    its.then(lambda _: random.seed(0))


@planted("nf4_quantize", "settings", **_BLOCKS)
def allows_itself_lower_precision(its: PatchedCopy) -> None:
    its.line(
        "flat = x.detach().flatten().float()",
        "flat = x.detach().flatten().float(); torch.set_float32_matmul_precision('medium')",
        file="dynamic_map",
    )


@planted_in_methods("dropout", dropout=0.25)
def drops_the_same_features_of_all_tokens(its: PatchedCopy) -> None:
    _drop_by(its, lambda x, p: torch.rand(x.shape[-1], device=x.device) >= p)


@planted_in_methods("dropout", dropout=0.25)
def drops_the_same_features_at_every_call(its: PatchedCopy) -> None:
    _drop_by(its, lambda x, p: torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device) >= p)


class _Drop(nn.Module):
    def __init__(self, p: float, mask: Callable[[Tensor, float], Tensor]) -> None:
        super().__init__()
        self.p, self.mask = p, mask

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask(x, self.p) / (1 - self.p) if self.training else x


def _drop_by(its: PatchedCopy, mask: Callable[[Tensor, float], Tensor]) -> None:
    def change(adapted: Any) -> None:
        for layer in adapted.layers.values():
            layer.dropout = _Drop(layer.dropout.p, mask)

    its.then(change)


@planted_in_methods("trajectory", adds_layers=True)
def shrinks_what_it_trains_between_steps(its: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        after = adapted.after_step

        def after_step(step: int) -> None:
            after(step)
            with torch.no_grad():
                for tensor in adapted.tensors().values():
                    tensor.mul_(0.99)

        adapted.after_step = after_step

    its.then(change)


@planted_in_methods("trajectory", only=["galore"])
def counts_only_its_first_step(its: PatchedCopy) -> None:
    its.line('state["step"] += 1', 'state["step"] = 1', file="galore")
