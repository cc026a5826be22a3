"""Planted faults of NF4 bases. Each is tried with the reference's LoRA on the packed base."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness.conformance.faults import line_fault, planted
from harness.conformance.faults.patched_copy import Pack, PackedForm, PatchedCopy, Right

_USUAL = {"rank": 3, "alpha": 8.0}

_nf4 = partial(line_fault, "nf4", values=_USUAL, inputs=64, outputs=128)
_nf4_dq = partial(line_fault, "nf4-dq", file="double_quant", values=_USUAL, inputs=64, outputs=128)
_planted = partial(planted, "nf4", values=_USUAL, inputs=64, outputs=128)

# fmt: off
FAULTS = [
    _nf4("puts_the_first_code_into_the_low_nibble", ["codes"],
        "return padded[0::2] << 4 | padded[1::2]", "return padded[1::2] << 4 | padded[0::2]"),
    _nf4("shares_an_absmax_between_two_blocks", ["codes"],
        "quantize_blockwise(W, codebook(), block)", "_halved(*quantize_blockwise(W, codebook(), 2 * block))",
        "def near_tie(",
        "def _halved(codes, absmax):\n    return codes, absmax.repeat_interleave(2)\n\n\ndef near_tie("),
    _nf4("takes_the_absmax_of_the_previous_block", ["codes"],
        "quantize_blockwise(W, codebook(), block)", "_rolled(*quantize_blockwise(W, codebook(), block))",
        "def near_tie(", "def _rolled(codes, absmax):\n    return codes, absmax.roll(1)\n\n\ndef near_tie("),
    _nf4("decodes_with_a_symmetric_codebook", ["forward"], "dequantize_blockwise(codes, absmax, codebook(), block)",
        "dequantize_blockwise(codes, absmax, torch.linspace(-1, 1, 16), block)"),
    line_fault("nf4-dq", "decodes_with_constants_in_16_bits", ["decoded"],
        "dequantize_blockwise(codes, absmax, codebook(), block)",
        "dequantize_blockwise(codes, absmax.bfloat16().float(), codebook(), block)", dtype="bfloat16"),
    _nf4("decodes_to_zero_under_autocast", ["calls"], "dequantize_blockwise(codes, absmax, codebook(), block)",
        "dequantize_blockwise(codes, absmax, codebook(), block) * (not torch.is_autocast_enabled('cpu'))"),
    _nf4_dq("quantises_the_constants_with_their_mean", ["codes"],
        "quantize_blockwise(flat - offset,", "quantize_blockwise(flat + 0 * offset,",
        " + offset.float()", ""),
    _nf4_dq("decodes_the_constants_without_their_mean", ["codes"], " + offset.float()", ""),
    _nf4_dq("is_one_code_off", ["codes"],
        "return codes, constants, offset", "return (codes + 1).clamp(max=255), constants, offset"),
    _nf4_dq("decodes_with_a_symmetric_codebook", ["forward"], "dequantize_blockwise(codes, absmax, codebook(), block)",
        "dequantize_blockwise(codes, absmax, torch.linspace(-1, 1, 16), block)", file=""),
]
# fmt: on


@_planted("codes")
def packs_nothing(copy: PatchedCopy) -> None:
    copy.replace_packing(lambda right, model, _: right(model, []))


@_planted("codes")
def packs_only_the_first_layer(copy: PatchedCopy) -> None:
    copy.replace_packing(lambda right, model, paths: right(model, paths[:1]))


@_planted("codes")
def adds_a_bias_to_a_layer_without_one(copy: PatchedCopy) -> None:
    def wrong(right: Pack, model: nn.Module, paths: list[str]) -> dict[str, PackedForm]:
        forms = right(model, paths)
        layer: Any = model.get_submodule("second")
        layer.bias = nn.Parameter(torch.ones(layer.out_features), requires_grad=False)
        return forms

    copy.replace_packing(wrong)


@_planted("base")
def changes_a_layer_that_it_does_not_pack(copy: PatchedCopy) -> None:
    def wrong(right: Pack, model: nn.Module, paths: list[str]) -> dict[str, PackedForm]:
        model.get_parameter("other.weight").data.mul_(1.5)
        return right(model, paths)

    copy.replace_packing(wrong)


@_planted("own_adapters")
def adds_a_bias_that_was_removed(copy: PatchedCopy) -> None:
    _change_forward(copy, lambda layer: partial(_with_first_bias, layer, layer.bias, layer.forward))


def _change_forward(copy: PatchedCopy, wrong_of: Callable[[Any], Right]) -> None:
    """Give each packed layer the forward pass that `wrong_of` makes for it."""

    def wrong(right: Pack, model: nn.Module, paths: list[str]) -> dict[str, PackedForm]:
        packed = right(model, paths)
        for path in paths:
            layer: Any = model.get_submodule(path)
            layer.forward = wrong_of(layer)
        return packed

    copy.replace_packing(wrong)


def _with_first_bias(layer: Any, bias: Tensor | None, right: Right, x: Tensor) -> Tensor:
    y = right(x)
    return y if bias is None or layer.bias is not None else y + bias


@_planted("save")
def keeps_the_decoded_weight_in_eval_mode(copy: PatchedCopy) -> None:
    _change_forward(copy, lambda layer: partial(_with_kept_weight, layer))


def _with_kept_weight(layer: Any, x: Tensor) -> Tensor:
    if layer.training or "kept" not in layer.__dict__:
        unit = torch.eye(layer.in_features, dtype=x.dtype)
        layer.kept = (type(layer).forward(layer, unit) - (0 if layer.bias is None else layer.bias)).T
    return nn.functional.linear(x, layer.kept.to(x.dtype), layer.bias)
