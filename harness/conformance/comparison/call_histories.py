"""Ways (forms) to call an adapted layer after something happened to it: other calls, new values, copies, hooks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import torch
from torch import Tensor, nn

from harness.conformance.comparison.call_forms import ROWS, Call, Form, collected, leaf_of, owns, tensors_of_copy
from harness.conformance.comparison.inputs import HALF
from harness.conformance.comparison.observations import preserved_state

Restore = Callable[[nn.Module, Mapping[str, Tensor]], object]
"""Function (layer, values by name) that gives the layer's parameters and buffers new values."""


def _in_parts(call: Call, parts: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Call the layer on each part (x, dy) of the input in turn. The gradients of all parts add up."""
    ys, gradients = list[Tensor](), list[Tensor | None]()
    with preserved_state(call.layer, call.tensors, call.training):
        for x, dy in parts:
            leaf = leaf_of(x)
            y = call.layer(leaf)
            if y.requires_grad and y.shape == dy.shape:
                y.backward(dy)
            ys.append(y.detach())
            gradients.append(leaf.grad)
        seen = collected(call, torch.cat(ys), gradients)
    return call.in_shape(seen, torch.cat([dy for _, dy in parts]))


def _micro_batches(call: Call) -> dict[str, Tensor]:
    """Call the layer on the first row, then on the remaining rows."""
    return _in_parts(call, [(call.x[:1], call.dy[:1]), (call.x[1:], call.dy[1:])])


def _token_by_token(call: Call) -> dict[str, Tensor] | None:
    """Call the layer on one row at a time, as a sequence of one token."""
    if call.x.dim() != 2:
        return None
    rows = (tuple(t[n].view(1, 1, -1) for t in (call.x, call.dy)) for n in range(ROWS))
    return _in_parts(call, [(x, dy) for x, dy in rows])


def _image_by_image(call: Call) -> dict[str, Tensor] | None:
    """Call the layer on one image, e.g. (C, H, W), at a time, without a batch dimension, as torch.nn allows."""
    return _in_parts(call, list(zip(call.x, call.dy, strict=True))) if call.x.dim() > 2 else None


def _after_other_sizes(call: Call) -> dict[str, Tensor]:
    """Call the layer on other inputs first: with more rows, with one row and with none. Then call it on its input.

    The first calls are in eval mode and, if `call.training` is True, then in training mode.
    """
    for training in dict.fromkeys([False, call.training]):
        with preserved_state(call.layer, {}, training):
            for x in (torch.cat([call.x] * 3), call.x[:1], call.x[:0]):
                call.layer(leaf_of(x))
                with torch.no_grad():
                    call.layer(x)
    return call.observe(call.x, call.dy)


def _after_overwritten_outputs(call: Call) -> dict[str, Tensor]:
    """Call the layer after the outputs of earlier calls were overwritten, as a program may do."""
    with torch.no_grad():
        call.layer(call.x).fill_(torch.nan)
        call.layer(leaf_of(call.x)).fill_(torch.nan)
    y = call.layer(leaf_of(call.x))
    y.detach().fill_(torch.nan)
    return call.observe(call.x, call.dy)


def _with_strided_tensors(call: Call) -> dict[str, Tensor]:
    """Call the layer while its trained tensors are transposed in memory."""
    held = {name: tensor.data for name, tensor in call.tensors.items()}
    try:
        for tensor in call.tensors.values():
            tensor.data = tensor.data.transpose(0, -1).contiguous().transpose(0, -1)
        return call.observe(call.x, call.dy)
    finally:
        for name, value in held.items():
            call.tensors[name].data = value


def _with_hooks(call: Call) -> dict[str, Tensor]:
    """Call the layer with a forward pre-hook, a forward hook and a backward hook.

    If the hooks are not called once each and in order, add the entry `calls of hooks`, so that the comparison fails.
    """
    called: list[str] = []
    handles = [
        call.layer.register_forward_pre_hook(lambda *_: called.append("before forward")),
        call.layer.register_forward_hook(lambda *_: called.append("forward")),
        call.layer.register_full_backward_hook(lambda *_: called.append("backward")),
    ]
    try:
        seen = call.observe(call.x, call.dy, call=lambda layer, x: layer(x))
    finally:
        for handle in handles:
            handle.remove()
    expected = ["before forward", "forward"] + ["backward"] * ("grad x" in seen)
    return seen if [one for one in called if one in expected] == expected else seen | {"calls of hooks": torch.ones(1)}


def _copied(call: Call) -> dict[str, Tensor] | None:
    """Call a deep copy of the layer.

    If the copy shares memory with the layer, add an entry, so that the comparison fails.
    """
    if not owns(call.layer, call.tensors):
        return None
    made = copy.deepcopy(call.layer)
    seen = call.observe(call.x, call.dy, layer=made)
    own, other = (set(_addresses(layer)) for layer in (call.layer, made))
    return seen | ({"memory shared with the original": torch.ones(1)} if own & other else {})


def _addresses(layer: nn.Module) -> Iterator[int]:
    """Yield the addresses of the storages of parameters and buffers, except of tensors that hide their storage."""
    for tensor in _named(layer).values():
        with suppress(RuntimeError):
            if address := tensor.untyped_storage().data_ptr():
                yield address


def _pickled(call: Call) -> dict[str, Tensor] | None:
    """Call a copy that was saved and loaded by pickle. Return None if the layer cannot be pickled."""
    if not owns(call.layer, call.tensors):
        return None
    try:
        made = pickle.loads(pickle.dumps(call.layer))  # noqa: S301  # our own bytes
    except (pickle.PicklingError, AttributeError, TypeError, NotImplementedError):
        return None
    return call.observe(call.x, call.dy, layer=made)


def _widened(call: Call) -> dict[str, Tensor] | None:
    """Call a copy that was cast to float64, called once, and cast back to its own dtype.

    Return None for a packed layer and for a layer with several floating-point dtypes.
    """
    numbers = [t for t in (*call.layer.parameters(), *call.layer.buffers()) if t.is_floating_point()]
    own = next(iter(call.tensors.values())).dtype if call.tensors else torch.float64
    if not owns(call.layer, call.tensors) or any(t.dtype != own for t in numbers) or call.is_packed:
        return None
    made = copy.deepcopy(call.layer).to(torch.float64)  # a layer may have an attribute `double`
    made(call.x.double() if call.x.is_floating_point() else call.x)
    return call.observe(call.x, call.dy, layer=made.to(own))


def is_packed(layer: nn.Module) -> bool:
    """Return whether the layer has parameters of integers."""
    return any(not p.is_floating_point() for p in layer.parameters())


def _functional(call: Call) -> dict[str, Tensor] | None:
    """Call a copy of the layer with wrong values, while torch.func.functional_call gives it the right tensors."""
    if not owns(call.layer, call.tensors):
        return None
    made = copy.deepcopy(call.layer)
    names = {id(t): name for name, t in made.named_parameters(remove_duplicate=False)}
    mine = tensors_of_copy(call.layer, made, call.tensors)
    given = {name: leaf_of(t) for name, t in call.tensors.items()}
    with torch.no_grad():
        for tensor in mine.values():
            tensor.mul_(HALF)
    replaced = {names[id(mine[name])]: tensor for name, tensor in given.items()}
    made.train(call.training)
    leaf = leaf_of(call.x)
    y = torch.func.functional_call(made, replaced, (leaf,))
    if y.requires_grad and y.shape == call.dy.shape:
        y.backward(call.dy)
    seen = {"y": y.detach()} | ({"grad x": leaf.grad} if leaf.grad is not None else {})
    return seen | {f"grad {name}": t.grad for name, t in given.items() if t.grad is not None}


def _after(restore: Restore) -> Form:
    """Return a form that calls a copy of the layer, gives the copy halved values by `restore`, and calls it again.

    Before `restore`, the copy is called twice in eval mode: once with and once without gradients. If `call.training` is
    True, it is first called in the same two ways in training mode.
    """

    def run(call: Call) -> dict[str, Tensor] | None:
        if not owns(call.layer, call.tensors) or call.is_packed:
            return None
        made = copy.deepcopy(call.layer)
        for training in dict.fromkeys([call.training, False]):
            made.train(training)
            made(leaf_of(call.x))
            with torch.no_grad():
                made(call.x)
        restore(made, _halved(call))
        return call.observe(call.x, call.dy, layer=made)

    return Form(run)


def _halved(call: Call) -> dict[str, Tensor]:
    """Return the layer's floating-point parameters and buffers by name, with those in `call.numbers` halved."""
    # By storage: an adapter may hand out its state as a transposed view of a parameter.
    halved = {t.untyped_storage().data_ptr() for t in call.numbers}
    values = {n: t.detach() for n, t in _named(call.layer).items()}
    return {n: t * HALF if t.untyped_storage().data_ptr() in halved else t for n, t in values.items()}


Mode = Callable[[str], AbstractContextManager[object]]
"""Function that takes the type of the device and returns the context of both calls."""


def _in_mode_after(mode: Mode, restore: Restore, *, frozen: bool = False) -> Form:
    """Return a form that calls a copy of the layer, gives the copy halved values by `restore`, and calls it again.

    Both calls are inside the context that `mode` returns. `restore` runs outside it. The copy is in eval mode. frozen:
    no tensor of the copy requires a gradient.
    """

    def run(call: Call) -> dict[str, Tensor] | None:
        if not owns(call.layer, call.tensors) or call.is_packed:
            return None
        made = copy.deepcopy(call.layer)
        made.eval()  # not chained: not every library's `eval` returns the module
        if frozen:
            made.requires_grad_(False)
        with mode(call.x.device.type):
            made(call.x)
        restore(made, _halved(call))
        with mode(call.x.device.type):
            y = made(call.x)
        return {"y": y.detach().clone()}

    return Form(run, "all gradients")


def _as_usual(_: str) -> AbstractContextManager[object]:
    return nullcontext()


@contextmanager
def _autocast(device: str) -> Iterator[None]:
    """Switch on autocast to bfloat16, and switch off gradients."""
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        yield


def _named(layer: nn.Module) -> dict[str, Tensor]:
    """Return all floating-point parameters and buffers of the layer by name."""
    there = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    return {name: t for name, t in there.items() if t.is_floating_point()}


def _copy_data(layer: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, tensor in _named(layer).items():
        tensor.data.copy_(values[name])


def _fused_step(layer: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Halve parameters by a step of torch's fused AdamW, which does not increment their `_version`."""
    parameters = dict(layer.named_parameters())
    stepped = {name: p for name, p in parameters.items() if not torch.equal(p.detach(), values[name])}
    for parameter in stepped.values():
        parameter.grad = torch.zeros_like(parameter)
    if stepped:
        torch.optim.AdamW(stepped.values(), lr=HALF, weight_decay=1.0, fused=True).step()
    for parameter in stepped.values():
        parameter.grad = None
    for name, buffer in _named(layer).items():
        if name not in parameters:
            buffer.data.copy_(values[name])


def _set_data(layer: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, tensor in _named(layer).items():
        tensor.data = values[name].clone()


def _replace_parameters(layer: nn.Module, values: Mapping[str, Tensor]) -> None:
    _copy_data(layer, values)
    for name, parameter in list(layer.named_parameters()):
        path, _, last = name.rpartition(".")
        made = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        setattr(layer.get_submodule(path), last, made)


def _load_state_dict(*, assign: bool) -> Restore:
    def restore(layer: nn.Module, values: Mapping[str, Tensor]) -> None:
        saved = layer.state_dict()
        layer.load_state_dict(saved | {name: t for name, t in values.items() if name in saved}, assign=assign)
        for name, tensor in _named(layer).items():
            if name not in saved:  # a buffer that no checkpoint has
                tensor.data.copy_(values[name])

    return restore


HISTORIES: dict[str, Form] = {
    "in micro-batches": Form(_micro_batches, rounds_differently=True),
    "token by token": Form(_token_by_token, rounds_differently=True),
    "image by image without a batch dimension": Form(_image_by_image, rounds_differently=True),
    "after calls of other sizes": Form(_after_other_sizes),
    "after earlier outputs were overwritten": Form(_after_overwritten_outputs),
    "with tensors transposed in memory": Form(_with_strided_tensors),
    "with hooks": Form(_with_hooks),
    "by a deep copy": Form(_copied),
    "by a pickled copy": Form(_pickled),
    "by a copy that was in float64": Form(_widened),
    "by functional_call": Form(_functional),
}
"""Name -> form that calls a layer in parts, with other properties, or after something happened to it."""
_MODES: dict[str, Mode] = {
    "under no_grad": lambda _: torch.no_grad(),
    "under inference_mode": lambda _: torch.inference_mode(),
}
_WAYS: dict[str, Restore] = {
    "a fused step": _fused_step,
    ".data.copy_()": _copy_data,
    "load_state_dict()": _load_state_dict(assign=False),
}
"""Name -> function that gives a layer new values between two calls. Both calls are in one mode of `_MODES`, under
autocast, or with frozen tensors."""
NEW_VALUES: dict[str, Form] = (
    {
        "after .data.copy_()": _after(_copy_data),
        "after .data = ...": _after(_set_data),
        "after new Parameters": _after(_replace_parameters),
        "after load_state_dict()": _after(_load_state_dict(assign=False)),
        "after load_state_dict(assign=True)": _after(_load_state_dict(assign=True)),
    }
    | {
        f"{name} before and after {way}": _in_mode_after(mode, restore)
        for name, mode in _MODES.items()
        for way, restore in _WAYS.items()
    }
    | {
        f"while all its tensors are frozen, before and after {way}": _in_mode_after(_as_usual, restore, frozen=True)
        for way, restore in _WAYS.items()
    }
)
"""Name -> form that calls a layer, halves its tensors (`Call.numbers`), and calls it again."""
NEW_VALUES_UNDER_AUTOCAST: dict[str, Form] = {
    f"under autocast before and after {way}": _in_mode_after(_autocast, restore) for way, restore in _WAYS.items()
}
"""Name -> form like those in `NEW_VALUES`, but with both calls under autocast to bfloat16 and without gradients."""
