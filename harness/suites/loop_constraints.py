"""Find settings of a suite that the training loop of another library does not support. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from harness.methods.peft_config import KEY, VIRTUAL_TOKENS
from harness.methods.spec import FieldProblem
from harness.suites.schema import CellKeys

_OUTPUT_LAYER = "lm_head"
_OURS = "`loop: harness`"


def problems(
    config: Mapping[str, Mapping[str, list[Any]]],
    keys: CellKeys,
    training: Mapping[str, list[Any]],
    steps: int,
    encoders: Sequence[str],
) -> Iterator[FieldProblem]:
    """Yield a problem for each setting that `loop: trl` does not support.

    config: Method -> field -> values. training: key of `training:` -> values. steps: number of
    training steps. encoders: the entry's models that are encoders.
    """
    for index, loop in enumerate(training.get("loop", ())):
        if loop == "trl":
            for what, hint in _of_trl(config, keys, training, steps, encoders):
                yield ("training", "loop", index), f"`loop` is trl, but {what}", hint


def _of_trl(
    config: Mapping[str, Mapping[str, list[Any]]],
    keys: CellKeys,
    training: Mapping[str, list[Any]],
    steps: int,
    encoders: Sequence[str],
) -> Iterator[tuple[str, str]]:
    """Yield a pair (reason, hint) for each setting that `loop: trl` does not support. Parameters: as in `problems`."""
    if not steps:
        yield "nothing is trained in 0 steps", "leave `loop` out"
    for name in encoders:
        yield f"{name} is an encoder, and SFTTrainer trains causal models only", f"write {_OURS} for {name}"
    if "float16" in keys.dtype:
        what = "dtype is float16: only the harness's own loop scales the loss and keeps float32 master weights"
        yield what, f"write `dtype: bfloat16` or {_OURS}"
    if "float64" in keys.dtype:
        what = "dtype is float64: trl computes the loss of every dtype in float32"
        yield what, f"write `dtype: float32` or {_OURS}"
    if any(training.get("layerwise", ())):
        yield "`layerwise` is true: SFTTrainer updates the weights after the backward pass", "remove one of the two"
    if any(training.get("compile", ())):
        yield "`compile` is true: SFTTrainer replaces the forward pass that was compiled", "remove one of the two"
    for name, fields in config.items():
        yield from _of_config(name, fields)


def _of_config(name: str, fields: Mapping[str, list[Any]]) -> Iterator[tuple[str, str]]:
    if any(fields.get("dropout", ())):
        what = f"`dropout` of {name} is not 0: SFTTrainer pads on the other side, so dropout hits other tokens"
        yield what, f"write `dropout: 0` or {_OURS}"
    if any(_OUTPUT_LAYER in value for value in fields.get("targets", ()) if isinstance(value, (list, tuple))):
        what = f"`targets` of {name} contain {_OUTPUT_LAYER}: SFTTrainer multiplies by its weight, without the adapter"
        yield what, f"leave {_OUTPUT_LAYER} out, or write {_OURS}"
    for adapter in fields.get(KEY, ()):
        kind = str(adapter.get("peft_type"))
        if kind in VIRTUAL_TOKENS:
            what = f"{kind} puts tokens before every text, but SFTTrainer calls the inner model, which lacks them"
            yield what, f"write {_OURS} for {kind}"
        if dropped := [key for key, value in adapter.items() if key.endswith("dropout") and value]:
            what = f"`{dropped[0]}` of {kind} is not 0: SFTTrainer pads on the other side, so dropout hits other tokens"
            yield what, f"write `{dropped[0]}: 0` or {_OURS}"
