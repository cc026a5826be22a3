"""The whole model as it trains, beside a copy of it that carries the reference's layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from harness.conformance.subject import DTYPES, Subject
from reference.layers import replace


def reference(subject: Subject, dtype: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return (model, trainable tensors): a copy of the subject's model in `dtype`, every adapted layer the reference's."""
    live = dict(subject.adapted.layers)
    tensors: dict[str, Tensor] = {}
    try:
        for path in live:
            layer, of_layer = subject.reference(path, dtype)
            replace(subject.model, path, layer)
            tensors |= {f"{path}.{name}": tensor for name, tensor in of_layer.items()}
        # Copied together, so that the names still point at the copy's tensors.
        model, tensors = copy.deepcopy((subject.model, tensors))
    finally:
        for path, layer in live.items():
            replace(subject.model, path, layer)
    model.to(DTYPES[dtype])
    if not subject.added():  # full fine-tuning: what trains is the model itself
        _share(model, subject.adapted.tensors())
        named = dict(model.named_parameters(remove_duplicate=False))
        tensors = {name: named[name] for name in subject.adapted.tensors()}
    return model, tensors


def _share(model: nn.Module, like: Mapping[str, Tensor]) -> None:
    """Let parameters of `model` be one where those of the same names in `like` are one (tied embeddings)."""
    owners: dict[int, str] = {}
    for path, tensor in like.items():
        owner = owners.setdefault(id(tensor), path)
        if owner != path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, model.get_parameter(owner))


def observe(
    model: nn.Module, tensors: Mapping[str, Tensor], subject: Subject, forward: Callable[[nn.Module], Tensor]
) -> dict[str, Tensor]:
    """Run forward and backward; return `logits` and `grad <name>`. The model's own dropout is off, its mode put back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for path in subject.adapted.layers:
        model.get_submodule(path).train(subject.trains_plainly)
    try:
        for tensor in tensors.values():
            tensor.grad = None
        logits = forward(model)
        generator = torch.Generator().manual_seed(0)
        dy = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits.device, logits.dtype)
        if logits.requires_grad:
            logits.backward(dy)
        seen = {"logits": logits.detach().clone()}
        seen |= {f"grad {name}": t.grad.detach().clone() for name, t in tensors.items() if t.grad is not None}
        return seen
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter in model.parameters():
            parameter.grad = None
