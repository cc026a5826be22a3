"""Paged optimizers. Dettmers et al., QLoRA, NeurIPS 2023, arXiv:2305.14314, section 3. An Operation, not a Method.

Paged optimizer states are in memory that accelerator and host share. When the accelerator's memory runs short, states
move to the host. They move back when their parameter is updated. No value changes.

In the paper, a driver moves the states. Here, the program moves them itself. A page consists of all large states of one
parameter. A budget limits the bytes of the pages on the device. If it is exceeded, the least recently used pages move
to the host.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from reference.shared.optimizers import loss_of
from reference.spec import Deviation, ReferenceSpec

SPEC = ReferenceSpec(
    paper="arXiv:2305.14314v1, section 3 (Paged Optimizers); minimum size as in bitsandbytes",
    deviations=(
        Deviation(
            topic="paged tensors",
            paper="the optimizer states",
            here="each state tensor of at least 100,000 elements; smaller ones stay on the device and are not counted",
            why="bitsandbytes has the same rule, by the elements of the parameter; the states of a LoRA matrix of "
            "4096 x 24 are not paged",
        ),
        Deviation(
            topic="movement",
            paper="NVIDIA's unified memory, page by page, when the accelerator runs out",
            here="this program, parameter by parameter, when the states exceed a given number of bytes",
            why="the driver's choice is neither documented nor repeatable; here the moves are counted",
        ),
        Deviation(
            topic="prefetch",
            paper="not stated",
            here="a parameter's states move to the device just before its update",
            why="bitsandbytes also prefetches them just before the update, and waits once, after the last",
        ),
        Deviation(
            topic="on the CPU",
            paper="not stated",
            here="the same moves, from one buffer to another, so that they can be tested",
            why="bitsandbytes pages nothing there and warns",
        ),
    ),
)

MIN_PAGED_ELEMENTS = 100_000


def is_paged(numel: int) -> bool:
    """Return whether a state of `numel` elements is large enough to be paged."""
    return numel >= MIN_PAGED_ELEMENTS


def to_host(state: Tensor) -> Tensor:
    """Return a copy of `state` on the host. If `state` is on CUDA, the copy is in pinned memory.

    The copy is complete on return, so that the caller may free `state`.
    """
    page = torch.empty(state.shape, dtype=state.dtype, device="cpu", pin_memory=state.is_cuda)
    return page.copy_(state)


def to_device(page: Tensor, device: torch.device) -> Tensor:
    """Return a copy on `device` of a state that is on the host."""
    return torch.empty(page.shape, dtype=page.dtype, device=device).copy_(page)


class Paged(torch.optim.Optimizer):
    """Wrapper that pages the large states of an optimizer. The results stay the same.

    inner: the optimizer. It must update each parameter independently (LBFGS does not), and its groups must hold no
    state. The wrapper calls `inner.step`, and with it the hooks of this step, once per parameter. The wrapper shares
    the parameter groups and the state of `inner`. Pass the wrapper, not `inner`, to a learning rate schedule.

    budget: bytes of paged states that may stay on the device. The states of the parameter that is being updated are
    always on the device. Once all states exist, the peak is therefore the larger of two numbers: the budget and the
    bytes of the largest page. Raises ValueError for a negative budget.
    """

    bytes_in: int
    """Bytes moved to the device so far."""
    bytes_out: int
    """Bytes moved to the host so far."""
    resident: int
    """Bytes of paged states on the device now."""
    peak: int
    """Largest value of `resident` so far, in bytes."""

    def __init__(self, inner: torch.optim.Optimizer, budget: int) -> None:
        if budget < 0:
            raise ValueError(f"budget must be a number of bytes of at least 0, got {budget}")
        super().__init__(inner.param_groups, inner.defaults)
        self.inner, self.budget = inner, budget
        self.bytes_in = self.bytes_out = self.resident = self.peak = 0
        self._on_device: OrderedDict[Tensor, int] = OrderedDict()  # parameter -> bytes, least recently used first
        self._share()

    def step(self, closure: Any = None) -> Any:
        """Take one step of every parameter that has a gradient, one after the other.

        Return the loss of `closure`, or None without a closure.
        """
        loss = loss_of(closure)
        try:
            for group in self.param_groups:
                for p in (p for p in group["params"] if p.grad is not None):
                    self._bring_in(p)
                    self.inner.param_groups = [{**group, "params": [p]}]
                    self.inner.step()
                    self._admit(p)
                    self.make_room(self.budget)
        finally:
            self.inner.param_groups = self.param_groups
        return loss

    def make_room(self, budget: int) -> None:
        """Move states to the host until at most `budget` bytes are on the device, e.g. before a long backward pass."""
        while self.resident > budget and self._on_device:
            p, size = self._on_device.popitem(last=False)
            for name in self._names(p):
                self.state[p][name] = to_host(self.state[p][name])
            self.resident -= size
            self.bytes_out += size

    def where(self) -> dict[Tensor, str]:
        """Map every parameter with paged states to `device` or `host`, the place where these states are now."""
        return {p: "device" if p in self._on_device else "host" for p in self.state if self._names(p)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict` of this optimizer or of `inner`. States that exceed the budget move to the host."""
        self.inner.load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
        self._on_device.clear()
        self.resident = 0
        for p in self.state:
            self._admit(p)
        self.make_room(self.budget)

    def _names(self, p: Tensor) -> list[str]:
        return [n for n, t in self.state[p].items() if isinstance(t, Tensor) and is_paged(t.numel())]

    def _size(self, p: Tensor) -> int:
        return sum(self.state[p][name].nbytes for name in self._names(p))

    def _bring_in(self, p: Tensor) -> None:
        if p in self._on_device or p not in self.state:
            return
        size = self._size(p)
        self.make_room(max(0, self.budget - size))
        for name in self._names(p):
            self.state[p][name] = to_device(self.state[p][name], p.device)
        self.bytes_in += size
        self._admit(p)

    def _admit(self, p: Tensor) -> None:
        """Record that the states of `p` are on the device, and that no other states were used more recently."""
        size = self._size(p)
        self.resident += size - self._on_device.pop(p, 0)
        self.peak = max(self.peak, self.resident)
        if size:
            self._on_device[p] = size
