"""Run a whole model forward and backward, as in training, and build copies of it with the reference's layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from harness.conformance.comparison.moved_numbers import perturbed
from harness.conformance.comparison.stacked_experts import one_by_one
from harness.conformance.normal_noise import normal_noise
from harness.conformance.subject import DTYPES, Subject, attach_reference
from harness.methods import module_copy
from reference.shared.layers import replace

INPUT_GRADIENT = "grad input"
"""Name under which `observe` returns the gradient of the model's input."""


def copied(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a model in `dtype`. In float64, the copy computes each expert of a mixture separately."""
    # A tensor that `to` would convert is converted right away, so that it is copied once and not twice.
    plain = [t for t in tensors(model).values() if type(t) in (nn.Parameter, Tensor) and t.grad is None]
    replaced = {id(t): _converted(t, dtype) for t in plain if t.is_floating_point() and t.dtype is not dtype}
    made: nn.Module = module_copy.copied(model, replaced=replaced).to(dtype)
    one_by_one(made, dtype)
    return made


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of a parameter or buffer in another dtype."""
    made = tensor.detach().to(dtype)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers of a model, by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def reference(subject: Subject, dtype: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a copy of the original model with the reference's layers, and the copy's trainable tensors by name.

    The copy is in `dtype`. Raises ValueError if no copy of the original model was kept.
    """
    if subject.original.model is None:
        raise ValueError("the model was too large to be copied before attaching")
    model = copied(subject.original.model, DTYPES[dtype])
    if not subject.added():  # full fine-tuning trains the model itself
        named = dict(model.named_parameters(remove_duplicate=False))
        tensors: dict[str, Tensor] = {name: named[name] for name in subject.adapted.tensors()}
        for tensor in tensors.values():
            tensor.requires_grad_(True)
        return model, tensors
    model.requires_grad_(False)
    tensors = {}
    for path in subject.bases:
        twin = subject.reference(path, dtype)
        replace(model, path, twin.layer)
        tensors |= {f"{path}.{name}": tensor for name, tensor in twin.tensors.items()}
    return model, tensors


def base(subject: Subject, dtype: str) -> nn.Module:
    """Return a copy of the model as it was before attaching, in `dtype` and in eval mode.

    A packed base is decoded. Raises ValueError if no copy of the original model was kept.
    """
    if subject.original.model is None:
        raise ValueError("the model was too large to be copied before attaching")
    model = copied(subject.original.model, DTYPES[dtype])
    for path in subject.packed:
        replace(model, path, subject.dense_base(path, DTYPES[dtype]))
    return model.to(DTYPES[dtype]).eval()


def start(subject: Subject, dtype: str, seed: int = 0) -> nn.Module:
    """Return the model of `base` with the Method's reference attached, in the state from which training starts.

    seed: seed of the random numbers with which the reference starts.
    """
    model = base(subject, dtype)
    attach_reference(subject.method, model, subject.config, None, torch.Generator().manual_seed(seed))
    return model.eval()


@torch.no_grad()
def move_numbers(model: nn.Module, dtype: str, generator: torch.Generator) -> None:
    """Move every floating-point parameter and buffer of `model` at random, at most to a neighbouring number of `dtype`."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(perturbed(tensor.double(), dtype, generator))


def observe(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    subject: Subject,
    forward: Callable[[nn.Module], Tensor],
    *,
    with_input: bool = False,
) -> dict[str, Tensor]:
    """Run the model forward and backward. Return `logits`, and the gradient of each tensor as `grad <name>`.

    The model runs in eval mode. If the config has no dropout (`subject.trains_plainly`), the adapted layers run in
    training mode. All gradients are removed afterwards. with_input: if the model's first argument is a floating-point
    tensor, let it need a gradient, and return the gradient as INPUT_GRADIENT.
    """
    leaves: list[Tensor] = []

    def make_leaf(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not given or not isinstance(given[0], Tensor) or not given[0].is_floating_point():
            return None
        leaves.append(given[0].detach().clone().requires_grad_(True))
        return leaves[-1], *given[1:]

    hook = model.register_forward_pre_hook(make_leaf) if with_input else None
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for path in subject.adapted.layers:
        model.get_submodule(path).train(subject.trains_plainly)
    try:
        for tensor in tensors.values():
            tensor.grad = None
        logits = forward(model)
        generator = torch.Generator().manual_seed(0)
        dy = normal_noise(logits.shape, generator).to(logits.device, logits.dtype)
        if logits.requires_grad:
            logits.backward(dy)
        seen = {"logits": logits.detach().clone()}
        # Not copied: `parameter.grad = None` below leaves the gradients to the caller.
        seen |= {f"grad {name}": t.grad.detach() for name, t in tensors.items() if t.grad is not None}
        if leaves and leaves[-1].grad is not None:
            seen[INPUT_GRADIENT] = leaves[-1].grad
        return seen
    finally:
        if hook is not None:
            hook.remove()
        for module, training in modes.items():
            module.training = training
        for tensor in (*model.parameters(), *tensors.values()):
            tensor.grad = None
