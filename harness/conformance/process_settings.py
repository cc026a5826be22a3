"""Process-wide state: settings of torch, and the shared random number generators."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import numpy as np
import torch

_Setting = tuple[Callable[[], object], Callable[[Any], object]]

_SWITCH: Any = torch.utils.deterministic
_CUDNN: Any = torch.backends.cudnn
_BACKENDS = ("mkldnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn", "cuda.matmul", "cudnn", "cudnn.conv", "cudnn.rnn")


def _precision(path: str) -> _Setting:
    place: Any = attrgetter(path)(torch.backends)
    return lambda: place.fp32_precision, lambda it: setattr(place, "fp32_precision", it)


# Name -> functions that read and restore a setting.
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


def snapshot() -> dict[str, object]:
    """Read all settings."""
    return {name: read() for name, (read, _) in _SETTINGS.items()}


def list_changes(before: dict[str, object]) -> list[str]:
    """Describe the settings that differ from `before`."""
    return [f"{name} is {have}, was {before[name]}" for name, have in snapshot().items() if have != before[name]]


@contextmanager
def restored() -> Iterator[list[str]]:
    """Restore all settings at the end; the list then describes those that had changed."""
    before, found = snapshot(), list[str]()
    try:
        yield found
    finally:
        found += list_changes(before)
        restore(before)


def restore(before: dict[str, object]) -> None:
    """Restore the settings that differ from `before`."""
    for name, have in snapshot().items():
        if have != before[name]:
            _SETTINGS[name][1](before[name])


def seed(value: int) -> None:
    """Seed torch like torch.manual_seed, without the record of the call stack that it makes for a later GPU: slow."""
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(value)


def find_seeding(act: Callable[[], object]) -> list[str]:
    """Name the random number generators that `act` seeds: after it their states are equal, independent of the states before.

    Drawing from them is allowed. They are restored.
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


def _alike(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return bool(np.array_equal(one, other))
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_alike, one, other))
    return bool(one == other)
