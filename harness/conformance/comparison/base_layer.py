"""Judgement of an adapted layer while a program trains the weight of its base layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from harness.conformance.case import Case
from harness.conformance.comparison.call_forms import Call
from harness.conformance.comparison.layer_comparison import reference_runs
from harness.conformance.comparison.observations import observe
from harness.conformance.comparison.tolerance_policies import Judgement, noise_floor
from harness.conformance.subject import Subject
from harness.methods.spec import method_info

TRAINED = "while the base weight trains"


def judge_with_trained_base(subject: Subject, case: Case, path: str, call: Call) -> Iterator[Judgement]:
    """Let the weight of the base layer at `path` require a gradient, and yield a judgement of output and gradients.

    Nothing is judged if the weight trains already (GaLore), if the layer does not hold it, or if the Method replaces it
    (PiSSA) or adds no layer. A layer may refuse by RuntimeError or ValueError, but may not compute another
    gradient or none.
    """
    weight = getattr(subject.bases[path], "weight", None)
    held = {id(p) for p in call.layer.parameters()}
    if not isinstance(weight, nn.Parameter) or weight.requires_grad or id(weight) not in held:
        return
    has_base = hasattr(subject.reference(path, subject.dtype).layer, "base")
    if not weight.is_floating_point() or method_info(subject.method).spec.start_from_weight or not has_base:
        return
    try:
        mine = _observe(call.layer, call.tensors, call.x, call.dy, training=call.training, base=subject.bases[path])
    except (RuntimeError, ValueError):
        return
    truth, draws = reference_runs(subject, path, call.x, call.dy, run=partial(_observe, base=None))
    yield noise_floor(mine, truth, draws, subject.dtype, case.factor("calls"))


def _observe(
    layer: Any, tensors: Mapping[str, Tensor], x: Tensor, dy: Tensor, *, base: Any, training: bool = False
) -> dict[str, Tensor]:
    """Observe a layer while the weight of its base trains. base: by default, `layer.base`."""
    weight = (base or layer.base).weight
    weight.requires_grad_(True)
    try:
        return observe(layer, {**tensors, "base weight": weight}, x, dy, training=training)
    finally:
        weight.requires_grad_(False)
