"""A program of a walk: one model with its adapter and optimizer, and the actions of a training program."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness.conformance.comparison.optimizer_steps import optimizer_of
from harness.conformance.normal_noise import normal_noise
from harness.conformance.subject import load
from harness.methods.spec import Adapted

Forward = Callable[[nn.Module], Tensor]
CHANGE = 1.5
"""Factor by which `reload_model` multiplies the adapter tensors before it restores them. `deepcopy` multiplies the
original's tensors and state by it."""


@dataclass
class Program:
    """One of the programs that take the same walk: a model, its adapter and its optimizer."""

    model: nn.Module
    adapted: Adapted
    attach: Callable[[], tuple[nn.Module, Adapted]]
    """Function that attaches the adapter to a new copy of the model. It returns the copy and the adapter."""
    forward: Forward
    """Function that runs a given model on the inputs of the walk, and returns the output."""
    may_train: bool
    """True if the model may be in training mode. False with dropout, whose two modes compute different outputs."""
    rounding: AbstractContextManager[object] = field(default_factory=nullcontext)
    """Context in which the program computes. It may change how results are rounded."""

    def __post_init__(self) -> None:
        self.optimizer = self._new_optimizer()
        self.steps = 0
        self.trained = self.adapted.parameters()
        self.set_training(self.may_train)

    def set_training(self, training: bool) -> None:
        """Put the model in training mode, if `training` and `may_train` are true, else in eval mode."""
        self.model.train(training and self.may_train)

    def backward(self, seed: int) -> None:
        """Run forward and backward on one micro-batch. Gradients are added up. seed: seed of the gradient of the output."""
        with self.rounding:
            y = self.forward(self.model)
            if y.requires_grad:
                y.backward(incoming(y, seed))

    def step(self) -> None:
        """Add the gradients of the Method's own loss term, take an optimizer step, call the Method's `after_step`, and
        clear the gradients.
        """
        with self.rounding:
            term = self.adapted.regularizer()
            if term is not None:
                term.backward()
            self.optimizer.step()
            self.steps += 1
            self.adapted.after_step(self.steps)
            self.optimizer.zero_grad()

    def merge(self) -> None:
        """Merge the adapter into the weights."""
        with self.rounding:
            self.adapted.merge()

    def unmerge(self) -> None:
        """Undo the merge."""
        with self.rounding:
            self.adapted.unmerge()

    def tensors_and_state(self) -> dict[str, Tensor]:
        """Map names to copies of the trained tensors and of the floating-point tensors of the state."""
        state = {name: t for name, t in self.adapted.state().items() if t.is_floating_point()}
        return {name: t.detach().clone() for name, t in (state | self.adapted.tensors()).items()}

    def scale_learning_rate(self, factor: float) -> None:
        """Multiply the learning rate by `factor`, as a scheduler does."""
        for group in self.optimizer.param_groups:
            group["lr"] *= factor

    def owns_tensors(self) -> bool:
        """Return whether the trained tensors are parameters of the model. False if only hooks hold them."""
        return {id(t) for t in self.adapted.parameters()} <= {id(p) for p in self.model.parameters()}

    def deepcopy(self) -> None:
        """Continue with a deep copy of the model, its adapter and its optimizer, and change the original."""
        everything = self.model, self.adapted, self.optimizer, self.trained
        original = self.adapted
        self.model, self.adapted, self.optimizer, self.trained = copy.deepcopy(everything)
        with torch.no_grad():
            for tensor in (*original.tensors().values(), *original.state().values()):
                if tensor.is_floating_point():
                    tensor.mul_(CHANGE)

    def reload_model(self) -> None:
        """Copy the model's state_dict, change every adapter tensor, and restore the model from the copy."""
        saved = {name: t.clone() if isinstance(t, Tensor) else t for name, t in self.model.state_dict().items()}
        with torch.no_grad():
            for tensor in self.adapted.tensors().values():
                tensor.mul_(CHANGE)
        self.model.load_state_dict(saved)

    def resume(self) -> None:
        """Save tensors, state and the optimizer's state_dict to a file, and load them into a new model and optimizer.

        The gradients are kept.
        """
        file = io.BytesIO()
        tensors, state = self.adapted.tensors(), self.adapted.state()
        torch.save({"tensors": tensors, "state": state, "optimizer": self.optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=False)
        gradients = {name: t.grad for name, t in tensors.items()}
        self.model, self.adapted = self.attach()
        load(self.adapted, saved["tensors"], saved["state"])
        for name, tensor in self.adapted.tensors().items():
            tensor.grad = gradients[name]
        self.optimizer = self._new_optimizer()
        self.optimizer.load_state_dict(saved["optimizer"])
        self.set_training(self.may_train)

    def freeze(self, frozen: bool) -> None:
        """Switch the gradients of the trained tensors off if `frozen`, else on."""
        if frozen:
            self.trained = self.adapted.parameters()
        for tensor in self.trained:
            tensor.requires_grad_(not frozen)

    def run(self, mode: str) -> dict[str, Tensor]:
        """Return the model's output `y` and, in modes with gradients, those of the trained tensors. mode: a key of
        RUN_MODES.
        """
        with self.rounding:
            return RUN_MODES[mode](self)

    def sync(self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Load `tensors` and `state`, so that the next comparison does not count earlier rounding errors.

        Names and shapes that this program lacks are ignored.
        """
        mine, held = self.adapted.tensors(), self.adapted.state()
        load(
            self.adapted,
            {name: value for name, value in tensors.items() if name in mine},
            {name: value for name, value in state.items() if name in held and held[name].shape == value.shape},
        )

    def _new_optimizer(self) -> torch.optim.Optimizer:
        # The learning rate of float32: a large step in 16 bits turns the noise of a large gradient into another sign.
        return optimizer_of(self.adapted, list(dict.fromkeys(self.adapted.parameters())), "float32", adamw="fused")


def incoming(y: Tensor, seed: int) -> Tensor:
    """Return a random gradient for the output y. Every dtype gets the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    return normal_noise(y.shape, generator).to(y.device, y.dtype)


def _with_gradients(program: Program, forward: Forward) -> dict[str, Tensor]:
    tensors = program.adapted.tensors()
    held = {name: t.grad for name, t in tensors.items()}
    try:
        for tensor in tensors.values():
            tensor.grad = None
        y = forward(program.model)
        if y.requires_grad:
            y.backward(incoming(y, seed=0))
        gradients = {f"grad {name}": t.grad.detach().clone() for name, t in tensors.items() if t.grad is not None}
        return {"y": y.detach().clone()} | gradients
    finally:
        for name, tensor in tensors.items():
            tensor.grad = held[name]


def _plainly(program: Program) -> dict[str, Tensor]:
    return _with_gradients(program, program.forward)


def _checkpointed(program: Program) -> dict[str, Tensor]:
    def forward(model: nn.Module) -> Tensor:
        y: Any = checkpoint(program.forward, model, use_reentrant=False)
        return y  # type: ignore[no-any-return]

    return _with_gradients(program, forward)


def _hooked(program: Program) -> dict[str, Tensor]:
    """Run the program with a forward hook on every adapted layer.

    Return the outputs and gradients and, under `calls of hooks`, how often each hook was called.
    """
    calls: list[str] = []
    handles = [
        program.model.get_submodule(path).register_forward_hook(lambda *_, path=path: calls.append(path))
        for path in program.adapted.layers
    ]
    try:
        seen = _with_gradients(program, program.forward)
    finally:
        for handle in handles:
            handle.remove()
    return seen | {"calls of hooks": torch.tensor([float(calls.count(path)) for path in program.adapted.layers])}


def _no_grad(program: Program) -> dict[str, Tensor]:
    with torch.no_grad():
        return {"y": program.forward(program.model).clone()}


def _inference(program: Program) -> dict[str, Tensor]:
    with torch.inference_mode():
        y = program.forward(program.model)
    return {"y": y.clone()}


RUN_MODES: dict[str, Callable[[Program], dict[str, Tensor]]] = {
    "backward": _plainly,
    "no_grad": _no_grad,
    "inference_mode": _inference,
    "checkpoint": _checkpointed,
    "hooks": _hooked,
}
