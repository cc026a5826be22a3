"""A paged optimizer without managed memory: large states live on the host and pass through a few slots on the device.

In QLoRA (Dettmers et al., arXiv:2305.14314, section 3) the driver moves memory pages when memory is short. Here the
copies are planned. A page consists of the large states of one parameter. Pages that fit a budget stay on the device.
Each other page is copied to the device before its parameter is updated, and back to the host afterwards. While one
parameter is updated, the page of the next is already copied in. On a CPU, the same copies run between buffers, one
after the other, so that they can be tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

MIN_PAGED_ELEMENTS = 100_000
"""Smallest number of elements of a state that is paged. bitsandbytes uses the same number."""
MOST_SLOTS = 3
_ALIGNMENT = 16
"""Alignment of the states in a slot: each state begins at a multiple of this number of bytes."""


def is_paged(state: Any) -> bool:
    """Return whether a state is paged: whether it is a tensor of at least `MIN_PAGED_ELEMENTS` elements."""
    return isinstance(state, Tensor) and state.numel() >= MIN_PAGED_ELEMENTS


def _large(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if is_paged(value)}


class Lane:
    """A queue of copies that run in parallel with the computation.

    On CUDA the queue is a stream. Elsewhere copies are synchronous.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def after(self, event: torch.cuda.Event | None) -> AbstractContextManager[Any]:
        """Return a context in which queued copies wait for `event`."""
        if self.stream is None:
            return nullcontext()
        if event is not None:
            self.stream.wait_event(event)
        return torch.cuda.stream(self.stream)

    def mark(self) -> torch.cuda.Event | None:
        """Return an event that occurs after all copies queued so far. Without CUDA, return None."""
        return None if self.stream is None else self.stream.record_event()

    def finish(self) -> None:
        """Let the host wait until all copies are done."""
        if self.stream is not None:
            self.stream.synchronize()


def _now(device: torch.device) -> torch.cuda.Event | None:
    """Return an event that occurs after all computation queued so far. Without CUDA, return None."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


class Slot:
    """A buffer on the device that holds one page at a time."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.free = _now(device)
        """Event that occurs when the previous page has been copied to the host."""

    def views(self, page: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors in the buffer for the states of `page`, with the names, shapes and dtypes of these states."""
        views, at = {}, 0
        for name, state in page.items():
            views[name] = self.buffer[at : at + state.nbytes].view(state.dtype).view(state.shape)
            at += _aligned(state.nbytes)
        return views


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def bytes_of(page: dict[str, Tensor]) -> int:
    """Return the number of bytes that a page takes in a slot."""
    return sum(_aligned(state.nbytes) for state in page.values())


def to_host(state: Tensor) -> Tensor:
    """Return a contiguous copy of a state on the host, in pinned memory if the state is on a GPU."""
    page = torch.empty(state.shape, dtype=state.dtype, device="cpu", pin_memory=state.is_cuda)
    return page.copy_(state)


class Paged(torch.optim.Optimizer):
    """Wrapper that pages the large states of another optimizer, without changing the results of its steps.

    inner: the other optimizer. The wrapper shares the groups and the state of `inner`. The step hooks of `inner` run
    once per parameter. `inner` must not store values in its groups, and must not combine parameters, as LBFGS does. All
    parameters must be on one device.

    budget: number of bytes that paged states may take on the device. If the largest page exceeds the budget, they take
    as much as that page. A state takes further memory while it is made or loaded. The constructor pages the states that
    `inner` already has. If the budget is below twice the largest page, there is only one slot, and copies do not
    overlap with updates. Raises ValueError for a negative budget.

    After each step that made new states, the wrapper decides again which pages stay on the device. Earlier parameters
    have priority.
    """

    def __init__(self, inner: torch.optim.Optimizer, budget: int) -> None:
        if budget < 0:
            raise ValueError(f"budget must be a number of bytes of at least 0, got {budget}")
        super().__init__(inner.param_groups, inner.defaults)
        self.inner, self.budget = inner, budget
        self.bytes_in = self.bytes_out = 0
        """Bytes copied so far: `bytes_in` to the device, and `bytes_out` to the host."""
        self.peak = 0
        """Largest number of bytes that pages and slots have taken on the device so far."""
        self._pages: dict[Tensor, dict[str, Tensor]] = {}  # parameter -> its page on the host
        self._resident: dict[Tensor, int] = {}  # parameter -> bytes of its page on the device
        self._slots: list[Slot] = []
        self._lanes: list[Lane] = []  # copies to the device, copies to the host
        self.state = inner.state
        present = {p: bytes_of(large) for p, state in self.state.items() if (large := _large(state))}
        self.peak = sum(present.values())
        for p in present:
            self._evict(p)
        self._plan()

    @property
    def resident(self) -> int:
        """Number of bytes that pages and slots take on the device now."""
        return sum(self._resident.values()) + sum(slot.buffer.nbytes for slot in self._slots)

    def where(self) -> dict[Tensor, str]:
        """Return a dict: parameter with paged states -> place of these states, `device` or `host`."""
        return dict.fromkeys(self._resident, "device") | dict.fromkeys(self._pages, "host")

    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient, one after the other.

        Return the loss that `closure` returns, or None without a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            made = self._steps([(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None])
        finally:
            self.inner.param_groups = self.param_groups
        if made:
            self._plan()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict` of this wrapper or of the inner optimizer.

        States that do not fit into the budget go to the host.
        """
        states = state_dict["state"]
        pages = {key: state for key, state in states.items() if _large(state)}
        self.inner.load_state_dict({**state_dict, "state": {k: s for k, s in states.items() if k not in pages}})
        self.state, self._pages, self._resident, self._slots = self.inner.state, {}, {}, []
        try:
            # The inner optimizer loads states to the device, so only one page at a time is loaded.
            for key, state in pages.items():
                self.inner.load_state_dict({**state_dict, "state": {key: state}})
                for p, loaded in self.inner.state.items():
                    if _large(loaded):
                        self.state[p] = loaded
                        self._evict(p)
        finally:
            self.inner.state, self.param_groups = self.state, self.inner.param_groups
        self._plan()

    def _steps(self, todo: list[tuple[dict[str, Any], Tensor]]) -> bool:
        """Update the parameters one after the other. Return whether a parameter got new paged states."""
        made, staged = False, self._staged([p for _, p in todo if p in self._pages])
        try:
            for group, p in todo:
                slot = next(staged) if p in self._pages else None
                self.inner.param_groups = [{**group, "params": [p]}]
                try:
                    self.inner.step()
                finally:
                    if slot is not None:
                        self._send_out(p, slot)
                if slot is None and p not in self._resident and _large(self.state[p]):
                    self._evict(p)
                    made = True
        finally:
            for lane in self._lanes:
                lane.finish()
        return made

    def _staged(self, parameters: list[Tensor]) -> Iterator[Slot]:
        """Yield, for each parameter in order, the slot that holds the parameter's page.

        Before the caller asks for the next slot, it must start the copy of the current page back to the host.
        """
        queue: list[tuple[Slot, dict[str, Tensor], torch.cuda.Event | None]] = []
        for k, p in enumerate(parameters):
            for follower in parameters[k + len(queue) : k + len(self._slots)]:
                slot = self._slots[(k + len(queue)) % len(self._slots)]
                queue.append((slot, *self._send_in(self._pages[follower], slot)))
            slot, views, ready = queue.pop(0)
            if ready is not None:
                torch.cuda.current_stream(p.device).wait_event(ready)
            self.state[p].update(views)
            yield slot

    def _send_in(self, page: dict[str, Tensor], slot: Slot) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        views, lane = slot.views(page), self._lanes[0]
        with lane.after(slot.free):
            for name, view in views.items():
                view.copy_(page[name], non_blocking=True)
        self.bytes_in += bytes_of(page)
        return views, lane.mark()

    def _send_out(self, p: Tensor, slot: Slot) -> None:
        page, lane = self._pages[p], self._lanes[1]
        with lane.after(_now(p.device)):
            for name, host in page.items():
                host.copy_(self.state[p][name], non_blocking=True)
        self.state[p].update(page)
        self.bytes_out += bytes_of(page)
        slot.free = lane.mark()

    def _evict(self, p: Tensor) -> None:
        """Move the large states of p to the host. They must not be in a slot."""
        large = _large(self.state[p])
        self._resident.pop(p, None)
        self.peak = max(self.peak, self.resident + bytes_of(large))
        self._pages[p] = {name: to_host(state) for name, state in large.items()}
        self.state[p].update(self._pages[p])
        self.bytes_out += bytes_of(large)

    def _plan(self) -> None:
        """Decide within the budget which pages stay on the device, and how many slots serve the other pages."""
        for p in list(self._resident):
            self._evict(p)
        self._slots = []
        sizes = {p: bytes_of(page) for p, page in self._pages.items()}
        remaining = self.budget
        if sum(sizes.values()) > remaining:
            device, largest = next(iter(sizes)).device, max(sizes.values())
            # Two slots overlap copies with updates; a third, for both directions at once, must not take half of the budget.
            count = min(MOST_SLOTS, len(sizes), max(1, min(2, remaining // largest), remaining // (2 * largest)))
            self._slots = [Slot(largest, device) for _ in range(count)]
            self._lanes = [Lane(device), Lane(device)]
            remaining -= count * largest
        for p, size in sizes.items():
            if size <= remaining:
                remaining -= size
                self._resident[p] = size
                self.state[p].update({n: host.to(p.device, copy=True) for n, host in self._pages.pop(p).items()})
                self.bytes_in += size
        self.peak = max(self.peak, self.resident)
