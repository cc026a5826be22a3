"""Judgement of what an adapted layer does with its base layer: the gradient of its weight, and its hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness.conformance.case import Case
from harness.conformance.comparison.call_forms import Call
from harness.conformance.comparison.layer_comparison import reference_runs
from harness.conformance.comparison.observations import observe, preserved_state
from harness.conformance.comparison.tolerance_policies import Judgement, noise_floor
from harness.conformance.subject import Subject
from harness.methods.spec import method_info
from reference.shared.layers import kind_of

TRAINED = "while the base weight trains"
HOOKED = "with a hook on the base layer, which does not run"


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


def forms_without_hooks(subject: Subject, path: str, call: Call) -> Iterator[str]:
    """Yield the name of each form of a call in which a forward hook on the base layer at `path` does not run once.

    Memory is offloaded, and activations are recorded, by such hooks. A layer that does not hold its base layer is left
    out, as are stacked experts and a layer whose reference does not call the base: PiSSA replaces its weight, and QLoRA
    packs it.
    """
    base: nn.Module = subject.bases[path]
    own: Any = subject.reference(path, subject.dtype)
    held = any(module is base for module in call.layer.modules()) and call.layer is not base
    if not held or kind_of(subject.original_base(path)) == "experts" or not hasattr(own.layer, "base"):
        return
    for name, training, recorded in (
        ("", True, True),
        (" in eval mode", False, True),
        (" under no_grad", False, False),
    ):
        runs = {
            module: _runs(layer, module, call.x, training=training, recorded=recorded)
            for layer, module in ((own.layer, own.layer.base), (call.layer, base))
        }
        if runs[own.layer.base] == 1 and runs[base] != 1:
            yield f"{HOOKED}{name}"


def _runs(layer: nn.Module, base: nn.Module, x: Tensor, *, training: bool, recorded: bool) -> int:
    """Call the layer, and return how often a forward hook on its base layer runs."""
    runs = []
    handle = base.register_forward_hook(lambda *_: runs.append(1))
    try:
        with preserved_state(layer, {}, training), torch.set_grad_enabled(recorded):
            layer(x)
    finally:
        handle.remove()
    return len(runs)
