"""Ways (forms) to call an adapted layer: shapes and layouts of the input, modes of torch, repetition and threads.

x is the layer's input, and dy the gradient of its output. Token numbers are the input of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness.conformance import process_settings
from harness.conformance.comparison.inputs import safe_factor
from harness.conformance.comparison.observations import observe, preserved_state
from harness.conformance.comparison.threads import at_once

ROWS = 4
REPEATS = 110
"""Number of calls with gradients of one layer: enough to find a fault that shows in every 100th call."""
LONG_RUN = 1030
"""Number of calls without gradients of one layer, as in the generation of a long text."""
THREADS = 2


@dataclass(frozen=True)
class Call:
    """One layer, an input x, and the gradient dy of its output."""

    layer: nn.Module
    tensors: Mapping[str, Tensor]
    x: Tensor
    """The input: rows of features (ROWS, D), token numbers (ROWS,), or a few images."""
    dy: Tensor
    training: bool
    """True if the layer runs in training mode. Only set for a layer without dropout."""
    numbers: Sequence[Tensor] = ()
    """All tensors that determine the output: the adapter's tensors and state, and the parameters of the base layer."""
    is_packed: bool = False  # True if the layer's weight is packed, so that not all numbers are in `numbers`

    def observe(
        self, x: Tensor, dy: Tensor, layer: nn.Module | None = None, training: bool | None = None, **how: Any
    ) -> dict[str, Tensor]:
        """Run the layer forward from `x` and backward from `dy`, and return the output and the gradients.

        The output has the shape of `self.dy`, and the gradient of the input that of `self.x`. layer: a copy of the layer to
        run instead. training: mode in which to run, in place of `self.training`. how: further arguments of `observe`.
        """
        tensors = self.tensors if layer is None else tensors_of_copy(self.layer, layer, self.tensors)
        mode = self.training if training is None else training
        seen = observe(layer or self.layer, tensors, x, dy, training=mode, **how)
        return self.in_shape(seen, dy)

    def in_shape(self, seen: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
        """Give the output in `seen` the shape of `self.dy`, and the gradient of x that of `self.x`. Return `seen`.

        An output whose shape differs from the incoming gradient `dy` stays as it is, so that a comparison fails.
        """
        if seen["y"].shape == dy.shape:
            seen["y"] = seen["y"].reshape(self.dy.shape)
        if "grad x" in seen:
            seen["grad x"] = seen["grad x"].reshape(self.x.shape)
        return seen

    def output(self, training: bool) -> dict[str, Tensor]:
        """Run the layer in training mode or eval mode, and return only the output."""
        with preserved_state(self.layer, self.tensors, training):
            return {"y": self.layer(self.x).detach().clone()}


@dataclass(frozen=True)
class Form:
    """A way to call a layer."""

    run: Callable[[Call], dict[str, Tensor] | None]
    """Function that calls the layer and returns the output and the gradients. It returns None if the form does not
    apply."""
    leaves_out: Literal["", "all gradients", "grad x", "the tensors' gradients"] = ""
    """Gradients that are missing from the result of `run`. Empty if none is missing."""
    rounds_differently: bool = False
    """True if a correct layer rounds differently in this form. The errors of the reference in this form are then
    allowed, too. For example, another memory layout changes the order of a sum."""

    def shown(self, names: Iterable[str]) -> list[str]:
        """Return those of `names` that the result of `run` contains. names: the output `y` and all gradients."""
        outputs, gradients = ("y",), ("y", "grad x")
        match self.leaves_out:
            case "all gradients":
                return [name for name in names if name in outputs]
            case "the tensors' gradients":
                return [name for name in names if name in gradients]
        return [name for name in names if name != self.leaves_out]


Layout = Callable[[Tensor], Tensor]
"""Function that returns rows (ROWS, D) in another shape or memory layout, in the same order."""


def _swapped(rows: Tensor) -> Tensor:
    """Return the four rows as (2, 2, D), with the batch and token dimensions swapped in memory."""
    return rows.reshape(2, 2, -1).transpose(0, 1).contiguous().transpose(0, 1)


def _every_second(rows: Tensor) -> Tensor:
    """Return a view of every second row of a larger tensor. The other rows hold NaN."""
    return torch.stack([rows, torch.full_like(rows, torch.nan)], dim=1).flatten(0, 1)[::2]


def _middle(rows: Tensor) -> Tensor:
    """Return a view of the middle of a larger tensor of NaN. There are gaps before the first row and after each row."""
    wide = rows.new_full((len(rows) + 2, rows.shape[1] + 3), torch.nan)
    wide[1:-1, 2:-1] = rows
    return wide[1:-1, 2:-1]


LAYOUTS: dict[str, Layout] = {
    "one token per sequence": lambda rows: rows.reshape(ROWS, 1, -1),
    "a batch of one sequence": lambda rows: rows.reshape(1, ROWS, -1),
    "four dimensions": lambda rows: rows.reshape(2, 1, 2, -1),
    "batch and tokens transposed": _swapped,
    "every second row of a tensor": _every_second,
    "the middle of a tensor": _middle,
    "rows transposed in memory": lambda rows: rows.T.contiguous().T,
}
"""Name -> layout of the rows that a linear layer gets as its input."""
IMAGE_LAYOUTS: dict[str, Layout] = {
    "channels_last": lambda images: images.contiguous(memory_format=torch.channels_last)
}
"""Name -> memory layout of the images of a convolution."""


def layouts_with_gradients(layouts: Mapping[str, Layout]) -> dict[str, Form]:
    """Return a form for each layout, by name. The form runs forward and backward with the input in this layout."""

    def form(layout: Layout) -> Form:
        return Form(lambda call: call.observe(layout(call.x), layout(call.dy)), rounds_differently=True)

    return {name: form(layout) for name, layout in layouts.items()}


WITHOUT_GRADIENTS: dict[str, tuple[Callable[[], Any], bool]] = {
    "under no_grad": (torch.no_grad, False),
    "under inference_mode": (torch.inference_mode, False),
    "under no_grad in training mode": (torch.no_grad, True),
}
"""Name -> (function that returns a context without gradients, whether the layer is in training mode)."""


def forms_without_gradients(layouts: Mapping[str, Layout]) -> dict[str, Form]:
    """Return forms that call the layer without gradients, per mode of WITHOUT_GRADIENTS and per mode and layout.

    Each mode has two more forms. The first calls the layer, calls it again with another input, and then returns the
    output of the first call. The second calls the layer on one row at a time and returns all outputs.
    """

    def form(
        without: Callable[[], Any], training: bool, layout: Layout, later: bool = False, apart: bool = False
    ) -> Form:
        def run(call: Call) -> dict[str, Tensor] | None:
            if (training and not call.training) or (apart and call.x.dim() != 2):
                return None
            with preserved_state(call.layer, call.tensors, training), without():
                x = layout(call.x)
                ys = [call.layer(part) for part in (x.split(1) if apart else [x])]
                if later:
                    call.layer(call.x.flip(0))
            return call.in_shape({"y": torch.cat(ys)}, layout(call.dy))

        return Form(run, "all gradients", rounds_differently=True)

    plain, found = _as_it_is, dict[str, Form]()
    for mode, (without, training) in WITHOUT_GRADIENTS.items():
        found[mode] = form(without, training, plain)
        found[f"{mode} before a later call"] = form(without, training, plain, later=True)
        found[f"{mode} token by token"] = form(without, training, LAYOUTS["one token per sequence"], apart=True)
        found |= {f"{mode} {name}": form(without, training, layout) for name, layout in layouts.items()}
    return found


def _as_it_is(rows: Tensor) -> Tensor:
    return rows


def _constant_input(call: Call) -> dict[str, Tensor]:
    """Call the layer with an input that needs no gradient, as the first layer of a model gets it."""
    return call.observe(call.x, call.dy, call=lambda layer, x: layer(x.detach()))


def _frozen(call: Call) -> dict[str, Tensor]:
    """Call the layer while its trained tensors require no gradient. The input still requires a gradient."""
    for tensor in call.tensors.values():
        tensor.requires_grad_(False)
    try:
        return call.observe(call.x, call.dy)
    finally:
        for tensor in call.tensors.values():
            tensor.requires_grad_(True)


def _checkpointed(call: Call) -> dict[str, Tensor]:
    return call.observe(call.x, call.dy, call=partial(checkpoint, use_reentrant=False))


def _checkpointed_again(call: Call) -> dict[str, Tensor] | None:
    """Call the layer under torch's reentrant checkpointing, whose first pass runs without gradients.

    Return None for token numbers, because this checkpointing needs an input with a gradient.
    """
    if not call.x.is_floating_point():
        return None
    return call.observe(call.x, call.dy, call=partial(checkpoint, use_reentrant=True))


def _eval(call: Call) -> dict[str, Tensor]:
    return call.observe(call.x, call.dy, training=False)


def _second_backward(call: Call) -> dict[str, Tensor]:
    """Run backward twice through one graph, and return the gradients of the second pass."""
    with preserved_state(call.layer, call.tensors, call.training):
        leaf = leaf_of(call.x)
        y = call.layer(leaf)
        for again in (True, False):
            for tensor in (leaf, *call.tensors.values()):
                tensor.grad = None
            if y.requires_grad and y.shape == call.dy.shape:
                y.backward(call.dy, retain_graph=again)
        return collected(call, y, [leaf.grad])


def _gradients_of_zeros(call: Call) -> dict[str, Tensor]:
    """Run backward while every gradient is a tensor of zeros, as `zero_grad(set_to_none=False)` leaves it."""

    def run(layer: nn.Module, x: Tensor) -> Tensor:
        for tensor in call.tensors.values():
            tensor.grad = torch.zeros_like(tensor)
        y: Tensor = layer(x)
        return y

    return call.observe(call.x, call.dy, call=run)


def _output_in_place(call: Call) -> dict[str, Tensor] | None:
    """Multiply the output in place, as `nn.ReLU(inplace=True)` would change it. The returned output is divided again.

    Return None if torch refuses the change, for example because the backward pass needs the output.
    """
    factor = safe_factor(call.output(call.training)["y"])
    try:
        seen = call.observe(call.x, call.dy / factor, call=lambda layer, x: layer(x).mul_(factor))
    except RuntimeError:
        return None
    return seen | {"y": seen["y"] / factor}


def _input_in_place(call: Call) -> dict[str, Tensor] | None:
    """Change the input in place before backward. Return None for token numbers, or if torch refuses the change."""
    if not call.x.is_floating_point():
        return None

    def run(layer: nn.Module, x: Tensor) -> Tensor:
        given = x * 1
        y: Tensor = layer(given)
        with torch.no_grad():
            given.mul_(-3)
        return y

    try:
        return call.observe(call.x, call.dy, call=run)
    except RuntimeError:
        return None


def _narrow_numbers(call: Call) -> dict[str, Tensor] | None:
    """Call the layer with token numbers of 32 bits, as some data loaders yield them."""
    return None if call.x.is_floating_point() else call.observe(call.x.int(), call.dy)


def _under(change: Callable[[], object]) -> Form:
    def run(call: Call) -> dict[str, Tensor]:
        with process_settings.restored():
            change()
            return call.observe(call.x, call.dy)

    return Form(run)


def _autocast_off(call: Call) -> dict[str, Tensor]:
    """Call the layer after autocast (automatic mixed precision) was switched on, and off again in an inner context."""
    device = call.x.device.type
    with torch.autocast(device, torch.bfloat16), torch.autocast(device, enabled=False):
        return call.observe(call.x, call.dy)


def _compiled(call: Call) -> dict[str, Tensor]:
    """Call the layer through torch.compile without code generation. The traced graph computes forward and backward."""
    torch.compiler.reset()
    try:
        return call.observe(call.x, call.dy, call=lambda layer, x: torch.compile(layer, backend="aot_eager")(x))
    finally:
        torch.compiler.reset()


def _repeated(call: Call) -> dict[str, Tensor]:
    """Run forward and backward many times. Return output and gradients of a run that differs from the first run.

    If no run differs, return the output and gradients of the first run.
    """
    first = call.observe(call.x, call.dy)
    later = (call.observe(call.x, call.dy) for _ in range(REPEATS))
    return next((one for one in later if not same(one, first)), first)


def _long_run(call: Call) -> dict[str, Tensor]:
    """Call the layer many times without gradients. Return an output that differs from the first, or else the first."""
    with torch.no_grad(), preserved_state(call.layer, call.tensors, training=False):
        first = {"y": call.layer(call.x).clone()}
        later = ({"y": call.layer(call.x)} for _ in range(LONG_RUN))
        return next((one for one in later if not same(one, first)), first)


def _threaded(call: Call) -> dict[str, Tensor]:
    """Call the layer in several threads at once, and return an output that differs from the output without threads.

    One thread uses `call.x`, the others use another input. Only an output for `call.x` is returned. If no such output
    differs, return the output without threads.
    """

    def run(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [call.layer(x).clone() for _ in range(8)]

    with preserved_state(call.layer, call.tensors, training=False):
        with torch.no_grad():
            alone = call.layer(call.x).clone()
        mine, *_ = at_once(run, [call.x, *(call.x.flip(0) for _ in range(THREADS - 1))])
    return {"y": next((one for one in mine if not torch.equal(one, alone)), alone)}


MODES: dict[str, Form] = {
    "in eval mode": Form(_eval),
    "with an input that needs no gradient": Form(_constant_input, "grad x"),
    "with frozen tensors": Form(_frozen, "the tensors' gradients"),
    "under activation checkpointing": Form(_checkpointed),
    "under reentrant checkpointing": Form(_checkpointed_again),
    "in a second backward pass": Form(_second_backward),
    "with gradients that are zeros": Form(_gradients_of_zeros),
    "with an output that is changed in place": Form(_output_in_place),
    "with an input that is changed later": Form(_input_in_place),
    "with token numbers in int32": Form(_narrow_numbers),
    "while torch's default dtype is bfloat16": _under(lambda: torch.set_default_dtype(torch.bfloat16)),
    "while torch's default dtype is float64": _under(lambda: torch.set_default_dtype(torch.float64)),
    "with deterministic algorithms": _under(lambda: torch.use_deterministic_algorithms(True)),
    "with autocast switched off again": Form(_autocast_off),
}
"""Name -> form that calls a layer in a mode of torch, of autograd or of the layer, or changes its input or output."""
REPEATED_FORM, LONG_RUN_FORM = f"{REPEATS} times", f"{LONG_RUN} times without gradients"
LONG_FORMS: dict[str, Form] = {
    "under torch.compile": Form(_compiled),
    REPEATED_FORM: Form(_repeated),
    LONG_RUN_FORM: Form(_long_run, "all gradients"),
    f"in {THREADS} threads": Form(_threaded, "all gradients"),
}
"""Name -> form that takes long. Only the first layer of a model is called in these forms."""


def leaf_of(x: Tensor) -> Tensor:
    """Return a copy of x that requires a gradient, if it holds floating-point numbers."""
    return x.detach().clone().requires_grad_(x.is_floating_point())


def collected(call: Call, y: Tensor, gradients: list[Tensor | None]) -> dict[str, Tensor]:
    """Return `y`, `gradients` (of the parts of x) joined as `grad x`, and the gradients of `call.tensors`."""
    parts = [one for one in gradients if one is not None]
    seen = {"y": y.detach().clone()} | ({"grad x": torch.cat(parts)} if parts else {})
    return seen | {f"grad {name}": t.grad.detach().clone() for name, t in call.tensors.items() if t.grad is not None}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether two dicts have the same names, and tensors with equal values. NaN equals nothing."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def owns(layer: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether all of `tensors` are parameters of the layer, so that a copy of the layer has copies of them."""
    return {id(t) for t in tensors.values()} <= {id(p) for p in layer.parameters()}


def tensors_of_copy(layer: nn.Module, other: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of `other` that correspond to `tensors`, by the same names.

    `tensors` are parameters of `layer`, and `other` is a copy of `layer`.
    """
    names = {id(t): name for name, t in layer.named_parameters(remove_duplicate=False)}
    copies: dict[str, Tensor] = dict(other.named_parameters(remove_duplicate=False))
    return {name: copies[names[id(t)]] for name, t in tensors.items() if id(t) in names}
