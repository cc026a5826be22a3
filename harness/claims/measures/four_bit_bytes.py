"""Measures: bits and bytes of a model whose linear layers are kept in 4 bits, with constants for each block (QLoRA)."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from harness.claims.measure import Config, MeasureResult, Method, Model, Positive, measure


@measure("bits")
def constant_bits(
    model: Model, double: bool = True, block: Positive = 64, second_block: Positive = 256
) -> MeasureResult:
    """Bits that the constants of blocks add to each weight, over all layers that QLoRA quantises in a model.

    double: whether the constants, 32 bits for `block` weights, are themselves in 8 bits, with 32 for `second_block` of them
    and 32 for their mean in each layer.
    """
    bits, weights = _constants(model, double, block, second_block)
    return MeasureResult(Fraction(bits, weights), f"{_in_words(double, block, second_block)}: {bits:,} / {weights:,}")


@measure("bytes")
def double_quantisation_saves(model: Model, block: Positive = 64, second_block: Positive = 256) -> MeasureResult:
    """Bytes that double quantisation of the constants saves over all layers that QLoRA quantises in a model."""
    one, weights = _constants(model, False, block, second_block)
    two, _ = _constants(model, True, block, second_block)
    each = float(Fraction(one - two, weights))
    return MeasureResult(Fraction(one - two, 8), f"{each:.6g} bit x {weights:,} weights / 8")


@measure("bytes")
def four_bit_bytes(
    model: Model,
    method: Method = "qlora",
    config: Config = {},  # nothing changes it
    rest: Literal[0, 2, 4] = 2,
    adapters: int = 0,
) -> MeasureResult:
    """Bytes of a model that QLoRA is attached to: 4-bit codes and constants, in the sizes that `attach` makes them.

    rest: bytes of each parameter that is not quantised (embeddings, output, norms). adapters: bytes for each number that
    trains: 2 of it alone in 16 bits, 12 with its gradient in 16 and Adam's moments in 32. Raises ValueError for a Method
    that quantises nothing.
    """
    from harness.claims import quantised_model
    from harness.conformance.subject import configure
    from reference.operations.double_quant import BLOCK

    if method != "qlora":
        raise ValueError(f"{method} keeps nothing in 4 bits; `method` can be qlora")
    found, knobs = quantised_model.of(model, config), configure(method, config)
    packed = found.bits(knobs.block, knobs.double_quant) // 8
    how = [
        f"{found.elements:,} weights in 4 bits with {_in_words(knobs.double_quant, knobs.block, BLOCK)}: {packed:,} B"
    ]
    how += [f"{found.rest:,} others x {rest} B"] * bool(rest)
    how += [f"{found.adapters:,} of the adapters x {adapters} B"] * bool(adapters)
    return MeasureResult(packed + found.rest * rest + found.adapters * adapters, " + ".join(how))


@measure("property")
def every_linear_layer_but_the_output(model: Model, method: Method = "qlora", config: Config = {}) -> MeasureResult:
    """Check whether what QLoRA quantises and adapts is every linear layer of a model but the one that gives the logits."""
    from harness.claims import attached_model, quantised_model

    found, built = quantised_model.of(model, config), attached_model.model(model)
    output = {path for path, layer in built.named_modules() if layer is built.get_output_embeddings()}
    left = ", ".join(sorted(set(found.outside) - output)[:3])
    how = f"{len(found.inside)} layers are in 4 bits; linear and not: {', '.join(found.outside) or 'none'}"
    return MeasureResult(set(found.outside) == output, how + (f"; left out: {left}" if left else ""))


def _constants(model: str, double: bool, block: int, second_block: int) -> tuple[int, int]:
    """Return (bits of all constants, weights that they are for)."""
    from harness.claims import quantised_model

    found = quantised_model.of(model, {})
    codes = 8 * sum(-(-numel // 2) * number for numel, number in found.weights.items())
    return found.bits(block, double, second_block) - codes, found.elements


def _in_words(double: bool, block: int, second_block: int) -> str:
    return f"8/{block} + 32/({block} x {second_block}) and 32 for a mean in each layer" if double else f"32/{block}"
