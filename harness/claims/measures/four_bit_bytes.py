"""Measures: bits and bytes of a QLoRA model. Its linear layers have 4-bit weights, and one constant per block of weights."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from harness.claims import attached_model, quantised_model
from harness.claims.measure import Config, MeasureResult, Method, Model, Positive, measure


@measure("bits")
def constant_bits(
    model: Model, double: bool = True, block: Positive = 64, second_block: Positive = 256
) -> MeasureResult:
    """Bits per weight that the block constants take, as a mean over all layers that QLoRA quantises.

    There is one constant per `block` weights. double: whether the constants are quantised too. A constant that is not
    quantised has 32 bits. A quantised constant has 8 bits, plus 32 bits per `second_block` constants, and 32 bits per
    layer for the mean of the constants.
    """
    bits, weights = _constants(model, double, block, second_block)
    return MeasureResult(Fraction(bits, weights), f"{_in_words(double, block, second_block)}: {bits:,} / {weights:,}")


@measure("bytes")
def double_quantisation_saves(model: Model, block: Positive = 64, second_block: Positive = 256) -> MeasureResult:
    """Bytes that a model saves by double quantisation, which quantises the block constants too.

    All layers that QLoRA quantises are included. block: number of weights that share a block constant. second_block:
    number of block constants that share a constant of the second quantisation.
    """
    one, weights = _constants(model, False, block, second_block)
    two, _ = _constants(model, True, block, second_block)
    each = float(Fraction(one - two, weights))
    return MeasureResult(Fraction(one - two, 8), f"{each:.6g} bit x {weights:,} weights / 8")


@measure("bytes")
def four_bit_bytes(
    model: Model,
    method: Method = "qlora",
    config: Config = {},  # it is never modified
    rest: Literal[0, 2, 4] = 2,
    adapters: int = 0,
) -> MeasureResult:
    """Bytes of a model with QLoRA attached: 4-bit weights, their constants, other parameters, and trainable numbers.

    rest: bytes per parameter that is not quantised (embeddings, output, norms). adapters: bytes per trainable number,
    e.g. 2 for a number in 16 bits, or 12 with its gradient in 16 bits and Adam's moments in 32 bits. Raises ValueError
    for a Method without quantisation.
    """
    from harness.conformance.subject import configure
    from reference.operations.double_quant import BLOCK

    if method != "qlora":
        raise ValueError(f"{method} has no 4-bit weights; `method` must be qlora")
    found, settings = quantised_model.of(model, config), configure(method, config)
    packed = found.bits(settings.block, settings.double_quant, BLOCK) // 8
    constants = _in_words(settings.double_quant, settings.block, BLOCK)
    how = [f"{found.elements:,} weights in 4 bits with constants of {constants} bits: {packed:,} B"]
    how += [f"{found.rest:,} other weights x {rest} B"] * bool(rest)
    how += [f"{found.adapters:,} adapter weights x {adapters} B"] * bool(adapters)
    return MeasureResult(packed + found.rest * rest + found.adapters * adapters, " + ".join(how))


@measure("property")
def every_linear_layer_but_the_output(model: Model, method: Method = "qlora", config: Config = {}) -> MeasureResult:
    """Check whether QLoRA quantises and adapts every linear layer of a model except the one that computes the logits."""
    found, built = quantised_model.of(model, config), attached_model.model(model)
    output = {path for path, layer in built.named_modules() if layer is built.get_output_embeddings()}
    left = ", ".join(sorted(set(found.outside) - output)[:3])
    how = f"{len(found.inside)} layers in 4 bits; other linear layers: {', '.join(found.outside) or 'none'}"
    return MeasureResult(set(found.outside) == output, how + (f"; not the output: {left}" if left else ""))


def _constants(model: str, double: bool, block: int, second_block: int) -> tuple[int, int]:
    """Return (bits of all constants, number of quantised weights)."""
    found = quantised_model.of(model, {})
    return found.bits(block, double, second_block) - found.code_bits, found.elements


def _in_words(double: bool, block: int, second_block: int) -> str:
    return f"8/{block} + 32/({block} x {second_block}) and 32 for a mean in each layer" if double else f"32/{block}"
