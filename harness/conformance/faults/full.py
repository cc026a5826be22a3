"""Planted faults of full fine-tuning and of the frozen model."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from harness.conformance.faults import FaultCase, line_fault, planted
from harness.conformance.faults.patched_copy import PatchedCopy

CASE = FaultCase()

_full = partial(line_fault, "full")
_frozen = partial(line_fault, "frozen")

# fmt: off
FAULTS = [
    _frozen("switches_the_model_to_eval_mode", ["detach"],
        "model.requires_grad_(False)", "model.requires_grad_(False).eval()"),
    _full("leaves_out_the_biases", ["layers"], "model.requires_grad_(True)",
        'model.requires_grad_(True)\n    [p.requires_grad_("bias" not in n) for n, p in model.named_parameters()]'),
    _full("lists_a_parameter_twice", ["parameters"],
        "return list(self.model.parameters())", "return [*self.model.parameters(), *self.model.parameters()][:-1]"),
    _full("lists_a_shared_weight_twice", ["parameters"], "return list(self.model.parameters())",
        "return [p for _, p in self.model.named_parameters(remove_duplicate=False)]", model="tied"),
    _frozen("trains_the_frozen_base", ["layers"], "model.requires_grad_(False)", "model.requires_grad_(True)"),
    _frozen("changes_the_base", ["base", "identity"],
        "model.requires_grad_(False)", "model.requires_grad_(False)\n    model.first.weight.data.add_(1e-3)"),
]
# fmt: on


@planted("full", "gradient", "step")
def loses_the_gradient_of_one_weight(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        layer = adapted.layers["second"]
        layer.forward = lambda x: nn.functional.linear(x, layer.weight.detach(), layer.bias)

    copy.change_adapted(change)
