"""A request to compare two sides by pairs of runs, and the command that makes it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from harness.regression.outputs.files import Outputs
from harness.regression.pairs import canary_file


@dataclass(frozen=True)
class PairsRequest:
    """Sides and Cells to compare, and the options of the comparison."""

    old: str
    new: str
    suite: str = "sentinels"
    """Name of a suite, or path of its file."""
    only: str | None = None
    """Expression that selects Cells of the suite."""
    out: Path | None = None
    """Folder for run folders and the document; None: a new one in results/runs."""
    repo: Path | None = None
    """Checkout with the revisions `old` and `new`; None: the harness's checkout, or `old` and `new` are implementations."""
    device: str = "auto"
    cores: int | None = None
    """CPU cores for each side; None: one on a CPU, all on a GPU."""
    seed: int | None = None
    """Seed of the order of the runs; None: random."""
    metric: str = ""
    """The only time to judge, named as in a history; empty: all times of a Cell."""
    canary: bool = True
    """Also run a Cell of the old side against itself."""
    canaries: Path = canary_file.FILE
    """File with the results of canaries."""
    strict: bool = False
    outputs: Outputs = field(default_factory=Outputs)

    def command(self) -> str:
        """Return the shell command that makes this request."""
        words = ["peft-harness", "gate", "--pairs", self.old, self.new, "--suite", self.suite, *self._selection()]
        return shlex.join(words + (["--cores", str(self.cores)] if self.cores is not None else []))

    def rerun_command(self) -> str:
        """Return the shell command that runs the Cells of this request again."""
        return shlex.join(["peft-harness", "run", self.suite, *self._selection()])

    def _selection(self) -> list[str]:
        cells = ["--only", self.only] if self.only is not None else []
        return cells + (["--device", self.device] if self.device != "auto" else [])
