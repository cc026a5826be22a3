"""What holds for the whole process: torch's settings, and the random numbers that others draw from too."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import numpy as np
import torch

_Setting = tuple[Callable[[], Any], Callable[[Any], Any]]

_SWITCH: Any = torch.utils.deterministic
_CUDNN: Any = torch.backends.cudnn
_BACKENDS = ("mkldnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn", "cuda.matmul", "cudnn", "cudnn.conv", "cudnn.rnn")


def _precision(path: str) -> _Setting:
    place: Any = attrgetter(path)(torch.backends)
    return lambda: place.fp32_precision, lambda it: setattr(place, "fp32_precision", it)


# Name -> how a setting is read, and how it is put back.
_SETTINGS: dict[str, _Setting] = {
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the default device": (torch.get_default_device, torch.set_default_device),
    "whether gradients are recorded": (torch.is_grad_enabled, torch.set_grad_enabled),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "deterministic algorithms": (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda it: torch.use_deterministic_algorithms(it[0], warn_only=it[1]),
    ),
    "filling of fresh memory": (
        lambda: _SWITCH.fill_uninitialized_memory,
        lambda it: setattr(_SWITCH, "fill_uninitialized_memory", it),
    ),
    "cudnn.benchmark": (lambda: _CUDNN.benchmark, lambda it: setattr(_CUDNN, "benchmark", it)),
    "autocast on the CPU": (
        lambda: torch.is_autocast_enabled("cpu"),
        lambda it: torch.set_autocast_enabled("cpu", it),
    ),
    "autocast on the GPU": (
        lambda: torch.is_autocast_enabled("cuda"),
        lambda it: torch.set_autocast_enabled("cuda", it),
    ),
}
if hasattr(torch.backends, "fp32_precision"):
    # `set_float32_matmul_precision` sets several of these, and reading it raises once this newer way was used.
    _SETTINGS |= {f"the precision of float32 products by {path}": _precision(path) for path in _BACKENDS}
else:
    _SETTINGS["the precision of float32 products"] = (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    )


def snapshot() -> dict[str, Any]:
    """Read all settings."""
    return {name: read() for name, (read, _) in _SETTINGS.items()}


def list_changes(before: dict[str, Any]) -> list[str]:
    """Say which settings are no longer what they were."""
    return [f"{name} is {have}, was {before[name]}" for name, have in snapshot().items() if have != before[name]]


@contextmanager
def restored() -> Iterator[list[str]]:
    """Put all settings back at the end; the list then says which were changed."""
    before, found = snapshot(), list[str]()
    try:
        yield found
    finally:
        found += list_changes(before)
        restore(before)


def restore(before: dict[str, Any]) -> None:
    """Set what is no longer what it was."""
    for name, have in snapshot().items():
        if have != before[name]:
            _SETTINGS[name][1](before[name])


def seed(value: int) -> None:
    """Seed torch's random numbers like torch.manual_seed, which also writes down the call stack for a GPU to come: slow."""
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)


def find_seeding(act: Callable[[], object]) -> list[str]:
    """Name the sources of random numbers that `act` seeds: after it they are alike, whatever they were before.

    Drawing from them is everybody's right. They are put back.
    """
    held = _random_states()
    try:
        after = []
        for value in (1, 2):
            seed(value)
            random.seed(value)
            np.random.seed(value)  # it is this one that old code draws from
            act()
            after.append(_random_states())
        alike = [name for name, state in after[0].items() if _alike(state, after[1].get(name))]
        return [f"the random numbers of {name} were seeded" for name in alike]
    finally:
        torch.set_rng_state(held["torch"])
        random.setstate(held["Python"])
        np.random.set_state(held["numpy"])
        if "CUDA" in held:
            torch.cuda.set_rng_state_all(held["CUDA"])


def _random_states() -> dict[str, Any]:
    states = {
        "torch": torch.get_rng_state(),
        "Python": random.getstate(),
        "numpy": np.random.get_state(legacy=True),
    }
    return states | ({"CUDA": torch.cuda.get_rng_state_all()} if torch.cuda.is_initialized() else {})


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_alike, one, other))
    return bool(one == other)
