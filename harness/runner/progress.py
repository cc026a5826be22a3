"""Progress on stderr: Cell k of n, phase, step, loss, time left; plain lines where stderr is no terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from harness.analysis import naming
from harness.records import Cell, Record

_REDRAW_S = 0.2


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Go on in silence: that nobody reads the progress any more is no reason to stop measuring."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


class Progress:
    """Shows one run. `event` takes what workers emit; every finished Cell leaves one line behind."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = len(cells)
        self.phase = ""
        self.peak_B: int | None = None
        """Highest memory of the Cell's finished phases, as far as its worker has told."""
        self.console = _Console(stderr=True, highlight=False)
        self._live: Live | None = None
        self._names = naming.full(cells)
        self._name = ""
        self._index = 0
        self._doing = self._said = ""
        self._seconds: list[float] = []
        self._cell_began = self._drawn = 0.0
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()

    def fetching(self, what: str, done: int, total: int | None) -> None:
        """Show a download or conversion; a callback for `assets.ensure`."""
        size = (
            f"{done / 2**20:.0f} of {total / 2**20:.0f} MiB" if total else (f"{done / 2**20:.0f} MiB" if done else "")
        )
        self._draw(f"{what} {size}".strip(), force=done in (0, total))

    def begin(self, index: int, cell: Cell) -> None:
        """Start showing Cell number `index`, counted from 1."""
        self._index, self._name, self._cell_began = index, self._names[cell.cell_id], time.monotonic()
        self.phase = self._doing = "start-up"
        self.peak_B = None
        self._draw(force=True)

    def event(self, event: dict[str, Any]) -> None:
        """Take one event of the worker."""
        if event.get("event") == "phase":
            self.phase = self._doing = str(event["name"])
            self.peak_B = event.get("peak_B")
        elif event.get("event") == "step":
            self._doing = f"train, step {event['step']} of {event['of']}, loss {event['loss']:.4f}"
        elif event.get("event") == "items":
            self._doing = f"evaluate, {event['done']} of {event['of']}"
        self._draw()

    def tick(self) -> None:
        """Redraw, so that a silent phase is seen to live."""
        self._draw()

    def end(self, record: Record) -> None:
        """Leave the Cell's line behind."""
        self._seconds.append(record.duration_s)
        accuracy = record.measurements.accuracy if record.measurements else None
        result = (
            f"accuracy {accuracy.value:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}]" if accuracy else record.because
        )
        first = result.splitlines()[0] if result else ""
        self._leave(record.status.value, f"{first}  {record.duration_s:.1f} s")

    def resumed(self, index: int, cell: Cell) -> None:
        """Leave the line of a Cell behind that need not run again."""
        self._index, self._name = index, self._names[cell.cell_id]
        self._leave("resumed", "has an ok Record")

    def _leave(self, how: str, result: str) -> None:
        self.say(f"{self._index}/{self.cells}  {how:<13} {self._name}  {result}")

    def say(self, line: str) -> None:
        """Print one line above the live one."""
        # Text, not markup: names and messages come from suites and libraries.
        self.console.print(Text(line), soft_wrap=True)

    def close(self) -> None:
        """Take the live line away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self, what: str = "", *, force: bool = False) -> None:
        now = time.monotonic()
        if self._live is None:
            # Some tools report nothing but that they are at work, again and again.
            if what and force and what != self._said:
                self._said = what
                self.say(what)
            return
        if not force and now - self._drawn < _REDRAW_S:
            return
        self._drawn = now
        if not what and self._name:
            what = f"{self._index}/{self.cells}  {self._name}  {self._doing}  {self._left(now)}"
        self._live.update(Text(what, overflow="ellipsis", no_wrap=True), refresh=True)

    def _left(self, now: float) -> str:
        spent = now - self._cell_began
        if not self._seconds:
            return f"{spent:.0f} s"
        mean = sum(self._seconds) / len(self._seconds)
        left = max(0.0, mean - spent) + mean * (self.cells - self._index)
        return (
            f"{spent:.0f} s, about {left / 60:.0f} min left" if left > 90 else f"{spent:.0f} s, about {left:.0f} s left"
        )
