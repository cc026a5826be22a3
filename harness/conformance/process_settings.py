"""Process-wide state: settings of torch, and the shared random number generators."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
import torch

_Setting = tuple[Callable[[], object], Callable[[Any], object]]

_SWITCH: Any = torch.utils.deterministic
_CUDNN: Any = torch.backends.cudnn
_BACKENDS = ("mkldnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn", "cuda.matmul", "cudnn", "cudnn.conv", "cudnn.rnn")


def _attribute(place: Any, name: str) -> _Setting:
    return lambda: getattr(place, name), lambda value: setattr(place, name, value)


def _precision(path: str) -> _Setting:
    return _attribute(attrgetter(path)(torch.backends), "fp32_precision")


# Name -> functions that read and restore a setting.
_SETTINGS: dict[str, _Setting] = {
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the default device": (torch.get_default_device, torch.set_default_device),
    "the recording of gradients": (torch.is_grad_enabled, torch.set_grad_enabled),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "deterministic algorithms": (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda value: set_deterministic(value[0], warn_only=value[1]),
    ),
    "the filling of fresh memory": _attribute(_SWITCH, "fill_uninitialized_memory"),
    **{f"cudnn.{name}": _attribute(_CUDNN, name) for name in ("benchmark", "deterministic", "enabled")},
    **{
        f"attention on the GPU by {kind}": (
            getattr(torch.backends.cuda, f"{kind}_sdp_enabled"),
            getattr(torch.backends.cuda, f"enable_{kind}_sdp"),
        )
        for kind in ("flash", "mem_efficient", "math", "cudnn")
    },
    "the detection of anomalies": (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    "autocast on the CPU": (partial(torch.is_autocast_enabled, "cpu"), partial(torch.set_autocast_enabled, "cpu")),
    "autocast on the GPU": (partial(torch.is_autocast_enabled, "cuda"), partial(torch.set_autocast_enabled, "cuda")),
    **{
        f"the dtype of autocast on the {device.upper()}": (
            partial(torch.get_autocast_dtype, device),
            partial(torch.set_autocast_dtype, device),
        )
        for device in ("cpu", "cuda")
    },
    "numpy's reaction to floating-point errors": (np.geterr, lambda value: np.seterr(**value)),
}
if hasattr(torch.backends, "fp32_precision"):
    # `set_float32_matmul_precision` sets several of these settings. Once one of them was set, `get_float32_matmul_precision`
    # raises an error.
    _SETTINGS |= {f"the precision of float32 products by {path}": _precision(path) for path in _BACKENDS}
else:
    _SETTINGS["the precision of float32 products"] = (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    )


def set_deterministic(on: bool, *, warn_only: bool = False) -> None:
    """Do what `torch.use_deterministic_algorithms` does, but without importing torch's compiler.

    The compiler has its own setting for determinism. It is changed only if the compiler is already imported.
    """
    if "torch._inductor.config" in sys.modules:
        torch.use_deterministic_algorithms(on, warn_only=warn_only)
    else:
        torch.set_deterministic_debug_mode(("warn" if warn_only else "error") if on else "default")


def snapshot() -> dict[str, object]:
    """Map the name of every setting to its value."""
    return {name: read() for name, (read, _) in _SETTINGS.items()}


def list_changes(before: dict[str, object]) -> list[str]:
    """Describe each setting that differs from `before`, which is a result of `snapshot`."""
    return [f"{name} is {value}, was {before[name]}" for name, value in snapshot().items() if value != before[name]]


@contextmanager
def others() -> Iterator[list[str]]:
    """Change some settings inside the context, and restore all settings at its end.

    A program may have any value of these settings while it attaches or calls an adapter: torch's default dtype, the
    recording of gradients, the number of threads, determinism, the filling of fresh memory and cudnn's search for the
    fastest algorithm. At the end, the yielded list gets a description of each change that the code inside the context
    made.
    """
    with restored():
        torch.set_default_dtype(torch.float64 if torch.get_default_dtype() != torch.float64 else torch.float32)
        torch.set_grad_enabled(not torch.is_grad_enabled())
        torch.set_num_threads(1)  # not more: a later fork of a process with several threads may hang
        set_deterministic(not torch.are_deterministic_algorithms_enabled(), warn_only=True)
        for place, name in ((_SWITCH, "fill_uninitialized_memory"), (_CUDNN, "benchmark")):
            setattr(place, name, not getattr(place, name))
        with restored() as changed:
            yield changed


@contextmanager
def restored() -> Iterator[list[str]]:
    """Restore all settings at the end of the context.

    The yielded list then gets a description of each setting that the code inside the context changed.
    """
    before, changes = snapshot(), list[str]()
    try:
        yield changes
    finally:
        changes += list_changes(before)
        restore(before)


def restore(before: dict[str, object]) -> None:
    """Restore the settings that differ from `before`, which is a result of `snapshot`."""
    for name, value in snapshot().items():
        if value != before[name]:
            _SETTINGS[name][1](before[name])


def seed(value: int) -> None:
    """Seed torch as torch.manual_seed does, but faster: torch.manual_seed also records the call stack for GPUs that are
    not initialised yet.
    """
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)


def random_states(device: torch.device) -> list[torch.Tensor]:
    """Return the states of the random number generators from which torch draws on the CPU and on `device`."""
    on_device = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state(device)]
    return [torch.get_rng_state(), *on_device]


def find_seeding(act: Callable[[], object]) -> list[str]:
    """Describe each random number generator that `act` seeds. Restore the states of all generators.

    `act` is called twice, with different states of the generators. If a generator returns the same next number after
    both calls, `act` has seeded it. Code that only draws numbers would leave the states different.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            first, second = (_draw_after(act, value) for value in (1, 2))
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
    return [f"the random numbers of {name} were seeded" for name, draw in first.items() if draw == second.get(name)]


def _draw_after(act: Callable[[], object], value: int) -> dict[str, float]:
    """Seed every generator with `value` and call `act`. Map the name of each generator to its next number."""
    seed(value)
    random.seed(value)
    np.random.seed(value)  # the generator that older code draws from
    act()
    wide, cuda = torch.float64, torch.cuda.is_initialized()
    return {
        "torch": torch.rand((), dtype=wide, device="cpu").item(),
        "Python": random.random(),  # noqa: S311  # no secret
        "numpy": np.random.random(),
        **({"CUDA": torch.rand((), dtype=wide, device="cuda").item()} if cuda else {}),
    }
