"""A request to compare two sides (revisions or implementations) by pairs of runs, and the shell commands for it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from harness.regression.outputs.files import Outputs
from harness.regression.pairs import canary_file


@dataclass(frozen=True)
class PairsRequest:
    """Two revisions or implementations and the Cells on which to compare them, with the options of the comparison."""

    old: str
    new: str
    suite: str = "sentinels"
    """Name of a suite, or path of its file."""
    only: str | None = None
    """Expression that selects Cells of the suite."""
    out: Path | None = None
    """Folder for the run folders and the JSON document. If None, a new folder in results/runs."""
    repo: Path | None = None
    """Checkout of a plug-in, to which the revisions `old` and `new` belong. If None, `old` and `new` are revisions of
    the harness, or implementations."""
    old_variables: tuple[str, ...] = ()
    """Environment variables of the old side's processes, each NAME=VALUE."""
    new_variables: tuple[str, ...] = ()
    """Environment variables of the new side's processes, each NAME=VALUE."""
    device: str = "auto"
    cores: int | None = None
    """Number of CPU cores for each side. If None, one core on a CPU, and all cores on a GPU."""
    seed: int | None = None
    """Seed for the order of the runs. If None, a random seed."""
    metric: str = ""
    """Name of the only time to judge, as `history show` prints it. If empty, all times of a Cell are judged."""
    canary: bool = True
    """True to compare the old side also with itself on one Cell, as a canary."""
    canaries: Path = canary_file.FILE
    """File that stores the canaries (comparisons of a revision with itself)."""
    fresh: bool = True
    """True to run further pairs of each Cell whose first pairs do not decide."""
    strict: bool = False
    outputs: Outputs = field(default_factory=Outputs)

    def command(self) -> str:
        """Return the shell command that starts this comparison."""
        words = ["peft-harness", "gate", "--pairs", self.old, self.new, "--suite", self.suite, *self._selection()]
        words += [word for one in self.old_variables for word in ("--old-variable", one)]
        words += [word for one in self.new_variables for word in ("--new-variable", one)]
        return shlex.join(words + (["--cores", str(self.cores)] if self.cores is not None else []))

    def rerun_command(self) -> str:
        """Return the shell command that runs the same Cells with `peft-harness run`."""
        return shlex.join(["peft-harness", "run", self.suite, *self._selection()])

    def _selection(self) -> list[str]:
        cells = ["--only", self.only] if self.only is not None else []
        return cells + (["--device", self.device] if self.device != "auto" else [])
