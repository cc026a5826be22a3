"""Judgement of a packed weight's codes: of all codes at once, or in pieces to save memory.

Levels are the values that codes stand for. An element near a tie is near the middle of two levels, so the codes of
both are right.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from harness.conformance.comparison.tolerance_policies import Judgement, exact, noise_floor, worst_of
from harness.conformance.subject import ExpectedCodes, PackedLayer
from reference.operations import double_quant, int8, nf4

PIECE = 2**22
"""Number of elements of a weight that are judged at a time. It is a multiple of the block size."""
_BLOCK = 64
_SAME = Judgement(True, 0.0, 0.0, "codes", "", "exact", 0)


def judge(form: PackedLayer, want: ExpectedCodes, bias: Tensor | None) -> tuple[Judgement, int]:
    """Judge the packed weight `form` and its `bias` by the codes, absmax and bias in `want`.

    Return the judgement, and the number of codes that differ only because of a tie.
    """
    have, expected, ties = _comparable(form, want)
    found = [exact(have | _named(bias), expected | _named(want.bias))]
    if form.double:
        found.append(_judge_double_quantised(form.absmax, want.absmax))
    return worst_of(found, "exact"), ties


def judge_rows(codes: Tensor, absmax: Tensor, weight: Tensor) -> Judgement:
    """Judge the 8-bit codes (E, D) and the absmax (E,) of a weight. A code near a tie may be the neighbouring one."""
    want, scales = int8.quantize(weight)
    if codes.shape != want.shape:
        return exact({"codes": codes}, {"codes": want})
    tied = int8.near_tie(weight) & ((codes.int() - want.int()).abs() == 1)
    return exact({"codes": torch.where(tied, want, codes), "absmax": absmax}, {"codes": want, "absmax": scales})


def judge_in_pieces(form: PackedLayer, layer: nn.Linear, bias: Tensor | None) -> tuple[Judgement, int]:
    """Judge a packed weight and its bias, with the expected codes of at most `PIECE` elements in memory.

    If the block or a size is wrong, all codes are judged at once. layer: the dense layer that was packed. bias: bias of
    the packed layer. Return the judgement and the number of ties, as `judge` does.
    """
    flat = layer.weight.detach().flatten()
    n = flat.numel()
    if (form.block, form.data.numel(), form.absmax.numel()) != (_BLOCK, -(-n // 2), -(-n // _BLOCK)):
        return judge(form, ExpectedCodes.of(layer.weight, bias=layer.bias), bias)
    found, absmax, ties = [], list[Tensor](), 0
    for start in range(0, n, PIECE):
        W = flat[start : start + PIECE]
        want, scales = nf4.quantize(W)
        absmax.append(scales)
        piece = replace(
            form,
            data=form.data.flatten()[start // 2 : (start + PIECE) // 2],
            absmax=form.absmax[start // _BLOCK : (start + PIECE) // _BLOCK],
        )
        differs = nf4.unpack(piece.data, len(W)) != want
        whole = len(W) % 2 == 0 or bool(piece.data[-1] == nf4.pack(want[-1:])[0])
        if whole and not differs.any() and (form.double or torch.equal(piece.absmax, scales)):
            found.append(_SAME)
            continue
        have, expected, tied = _comparable(piece, ExpectedCodes(want, scales, _near_tie(W, differs), None))
        found.append(exact(have, expected))
        ties += tied
    if form.double:
        found.append(_judge_double_quantised(form.absmax, torch.cat(absmax)))
    if bias is not None or layer.bias is not None:
        found.append(exact(_named(bias), _named(layer.bias)))
    return worst_of(found, "exact"), ties


def _named(bias: Tensor | None) -> dict[str, Tensor]:
    return {} if bias is None else {"bias": bias.detach()}


def _near_tie(W: Tensor, requested: Tensor) -> Tensor:
    """Return a mask of the elements of W near a tie, computed only for blocks that contain a requested element.

    In all other blocks the mask is False. requested: bool mask of elements of W.
    """
    rows, requested = (torch.nn.functional.pad(t, (0, -len(W) % _BLOCK)).view(-1, _BLOCK) for t in (W, requested))
    mask = torch.zeros_like(requested)
    blocks = requested.any(1)
    mask[blocks] = nf4.near_tie(rows[blocks]).view(-1, _BLOCK)
    return mask.flatten()[: len(W)]


def _comparable(form: PackedLayer, want: ExpectedCodes) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Return the subject's tensors, the expected tensors, and the number of codes that differ only because of a tie.

    Allowed differences are removed, so that the tensors are equal if the codes are correct. An absmax that is itself
    quantised is left out. If the number of elements is odd, the last byte also holds a code that stands for 0.
    """
    n = want.codes.numel()
    codes, right = (nf4.unpack(data, n + n % 2) for data in (form.data, nf4.pack(want.codes)))
    near_tie = torch.nn.functional.pad(want.near_tie, (0, n % 2))
    tied = near_tie & ((codes.int() - right.int()).abs() == 1)
    zero = (want.absmax == 0) & (form.absmax.abs() <= torch.finfo(torch.float32).tiny)
    equivalent = tied | zero.repeat_interleave(form.block)[: codes.numel()]
    have, expected = {"codes": torch.where(equivalent, right, codes)}, {"codes": right}
    if not form.double:
        have["absmax"] = torch.where(zero, want.absmax, form.absmax)
        expected["absmax"] = want.absmax
    return have, expected, int(tied.sum())


def _judge_double_quantised(absmax: Tensor, want: Tensor) -> Judgement:
    """Judge an absmax that is itself quantised, by its decoded values."""
    expected = {"absmax": double_quant.dequantize(*double_quant.quantize(want))}
    return noise_floor({"absmax": absmax}, expected, expected, "float32")
