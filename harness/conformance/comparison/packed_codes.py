"""Judgement of the codes of a packed weight: whole, or in pieces where memory is short."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from harness.conformance.comparison.tolerance_policies import Judgement, exact, noise_floor, worst_of
from harness.conformance.subject import ExpectedCodes, PackedLayer
from reference.operations import double_quant, nf4

PIECE = 2**22
"""Weights that are judged at a time, in float64: a whole number of blocks and of bytes."""
_BLOCK = 64
_SAME = Judgement(True, 0.0, 0.0, "codes", "", "exact", 0)


def judge(form: PackedLayer, want: ExpectedCodes, bias: Tensor | None) -> tuple[Judgement, int]:
    """Judge a packed weight and its bias. Also return the number of codes that are excused as ties (see the check
    `codes`).
    """
    have, expected, ties = _comparable(form, want)
    if want.bias is not None:
        expected["bias"] = want.bias
        have |= {"bias": bias.detach()} if isinstance(bias, Tensor) else {}
    found = [exact(have, expected)]
    if form.double:
        found.append(_judge_double_quantised(form.absmax, want.absmax))
    return worst_of(found, "exact"), ties


def judge_in_pieces(form: PackedLayer, layer: nn.Linear, bias: Tensor | None) -> tuple[Judgement, int]:
    """Judge by the dense `layer` itself, with the codes of no more than `PIECE` weights at a time in memory.

    bias: of the packed layer. Returns as `judge`.
    """
    flat = layer.weight.detach().flatten()
    n = flat.numel()
    if (form.block, form.data.numel(), form.absmax.numel()) != (_BLOCK, -(-n // 2), -(-n // _BLOCK)):
        return judge(form, ExpectedCodes.of(layer), bias)
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
        other = nf4.unpack(piece.data, len(W)) != want
        if not other.any() and (form.double or torch.equal(piece.absmax, scales)):
            found.append(_SAME)
            continue
        have, expected, tied = _comparable(piece, ExpectedCodes(want, scales, _near_tie(W, other), None))
        found.append(exact(have, expected))
        ties += tied
    if form.double:
        found.append(_judge_double_quantised(form.absmax, torch.cat(absmax)))
    if layer.bias is not None:
        found.append(exact({} if bias is None else {"bias": bias.detach()}, {"bias": layer.bias.detach()}))
    return worst_of(found, "exact"), ties


def _near_tie(W: Tensor, asked: Tensor) -> Tensor:
    """Return the mask of `nf4.near_tie`, computed only in the blocks that contain a requested element; elsewhere False."""
    rows, wanted = (torch.nn.functional.pad(t, (0, -len(W) % _BLOCK)).view(-1, _BLOCK) for t in (W, asked))
    mask = torch.zeros_like(wanted)
    some = wanted.any(1)
    mask[some] = nf4.near_tie(rows[some]).view(-1, _BLOCK)
    return mask.flatten()[: len(W)]


def _comparable(form: PackedLayer, want: ExpectedCodes) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Return the tensors that must be equal, on both sides, and the number of excused codes. A double-quantised absmax
    is left out.
    """
    codes = nf4.unpack(form.data, want.codes.numel())
    tied = want.near_tie & ((codes.int() - want.codes.int()).abs() == 1)
    zero = (want.absmax == 0) & (form.absmax.abs() <= torch.finfo(torch.float32).tiny)
    excused = tied | zero.repeat_interleave(form.block)[: codes.numel()]
    have, expected = {"codes": torch.where(excused, want.codes, codes)}, {"codes": want.codes}
    if not form.double:
        have["absmax"] = torch.where(zero, want.absmax, form.absmax)
        expected["absmax"] = want.absmax
    return have, expected, int(tied.sum())


def _judge_double_quantised(absmax: Tensor, want: Tensor) -> Judgement:
    """Judge what a double-quantised absmax decodes to."""
    twice = {"absmax": double_quant.dequantize(*double_quant.quantize(want))}
    return noise_floor({"absmax": absmax}, twice, twice, "float32")
