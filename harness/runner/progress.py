"""Show progress on stderr: the phase, step and loss of each running Cell, and the time left.

If stderr is not a terminal, only complete lines are printed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from harness.console import visible
from harness.records import naming
from harness.records.record import Cell, Record

_REDRAW_S = 0.2
_MOST_LINES = 8


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Stop printing, because stderr is closed. The run continues."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


@dataclass
class _RunningCell:
    began: float
    doing: str = "start-up"
    queued: bool = False
    """True if the Cell is in a batch system. Batch systems do not report the start of a Cell, so it may still be
    waiting."""


class Progress:
    """The progress display of one run. It listens to the run's executor, and prints one line per finished Cell."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.console = _Console(stderr=True, highlight=False)
        self._live: Live | None = None
        self._names = naming.full(cells)
        self._numbers = {cell.cell_id: number for number, cell in enumerate(cells, 1)}
        self._running: dict[str, _RunningCell] = {}
        self._last_line = ""
        self._seconds: list[float] = []
        self._over = 0
        self._drawn = 0.0
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()

    def fetching(self, what: str, done: int, total: int | None) -> None:
        """Show the progress of a download or conversion."""
        of = f" of {total / 2**20:.0f}" if total else ""
        size = f" {done / 2**20:.0f}{of} MiB" if done or total else ""
        self._draw(what + size, force=done in (0, total))

    def begin(self, cell: Cell) -> None:
        """Add a Cell to the display."""
        self._running[cell.cell_id] = _RunningCell(time.monotonic())
        self._draw(force=True)

    def event(self, cell: Cell, event: dict[str, Any]) -> None:
        """Show what a Cell's worker has reported, e.g. a new phase or the loss of a step."""
        if event.get("event") == "phase":
            doing = str(event["name"])
        elif event.get("event") == "step":
            doing = f"train, step {event['step']} of {event['of']}, loss {event['loss']:.4f}"
        elif event.get("event") == "items":
            doing = f"evaluate, {event['done']} of {event['of']}"
        else:
            return
        one = self._running[cell.cell_id]
        one.doing, one.queued = doing, bool(event.get("queued"))
        self._draw()

    def tick(self) -> None:
        """Redraw the display, so that the time advances even in a phase without events."""
        self._draw()

    def end(self, record: Record) -> None:
        """Remove a Cell from the display, and print its line."""
        self._running.pop(record.cell_id, None)
        self._seconds.append(record.duration_s)
        measured = record.measurements
        accuracy = measured.accuracy if measured else None
        result = (
            f"accuracy {accuracy.value:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}]" if accuracy else record.because
        )
        first = result.splitlines()[0] if result else ""
        # Other reasons are only in the report. This reason is shown, because another machine may have more memory.
        reasons = [one.because for one in measured.latency if "out of memory" in one.because] if measured else []
        untimed = f"  no latencies: {reasons[0]}" if reasons else ""
        self._finished(record.cell_id, record.status.value, f"{first}  {record.duration_s:.1f} s{untimed}")

    def resumed(self, cell: Cell) -> None:
        """Print the line of a Cell that does not run again in a resumed run."""
        self._finished(cell.cell_id, "resumed", "has an ok Record")

    def _finished(self, cell_id: str, status: str, result: str) -> None:
        self._over += 1
        self.print(f"{self._place(cell_id)}  {status:<13} {self._names[cell_id]}  {result}")

    def _place(self, cell_id: str) -> str:
        return f"{self._numbers[cell_id]}/{len(self._numbers)}"

    def print(self, line: str) -> None:
        """Print one line above the live display."""
        # Text, not markup: names and messages come from suites and libraries.
        self.console.print(Text(visible(line)), soft_wrap=True)

    def close(self) -> None:
        """Remove the live display."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self, line: str = "", *, force: bool = False) -> None:
        now = time.monotonic()
        if self._live is None:
            # Some tools report the same line many times.
            if line and force and line != self._last_line:
                self._last_line = line
                self.print(line)
            return
        if not force and now - self._drawn < _REDRAW_S:
            return
        self._drawn = now
        lines = map(visible, [line] if line else self._lines(now))
        self._live.update(Text("\n".join(lines), overflow="ellipsis", no_wrap=True), refresh=True)

    def _lines(self, now: float) -> list[str]:
        shown = list(self._running.items())[:_MOST_LINES]
        lines = [
            f"{self._place(cell_id)}  {self._names[cell_id]}  {one.doing}  {now - one.began:.0f} s"
            for cell_id, one in shown
        ]
        if len(self._running) > len(shown):
            lines.append(f"and {len(self._running) - len(shown)} more running")
        # The number of queued Cells that are running is unknown.
        if lines and self._seconds and not any(one.queued for one in self._running.values()):
            lines[-1] += f", {self._left(now)}"
        return lines

    def _left(self, now: float) -> str:
        """Return a text with the estimated time left.

        The estimate assumes that every Cell takes the average time, and that the number of Cells at a time stays the
        same.
        """
        mean = sum(self._seconds) / len(self._seconds)
        spent = sum(min(mean, now - one.began) for one in self._running.values())
        left = (mean * (len(self._numbers) - self._over) - spent) / max(1, len(self._running))
        return f"about {left / 60:.0f} min left" if left > 90 else f"about {left:.0f} s left"
