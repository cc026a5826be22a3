"""Selection of the cases and checks that `check` tries. Imports no torch."""

from __future__ import annotations

import shlex
import zlib
from dataclasses import dataclass
from typing import Any

Values = dict[str, Any]
"""Values of a Method's config, or of an Operation's case: key -> number, word or list."""


@dataclass(frozen=True)
class CaseSelection:
    """Options of `check` that decide which cases of a Method, an Operation or a loader are tried, and by which checks."""

    full: bool = False
    """True selects every combination of the parity suite's configs, shapes, layers and dtypes. False selects a part of
    them."""
    drawn: int = 0
    """Number of random cases in addition to the fixed sample."""
    seed: int = 0
    """Seed of the random cases."""
    wide: bool = False
    """True adds a fixed sample of cases, which covers pairs of settings. It also adds the checks of unmerging, of
    random walks and of NaN, runs the check `calls` in every case instead of a few, and all other checks in every example
    of a suite. See `is_wide`."""

    case: str = ""
    """Only cases are tried whose name and dtype contain this text, e.g. `rank=160 bfloat16`."""
    checks: tuple[str, ...] = ()
    """Names of the only checks to run. If empty, all checks of a parity suite run."""
    shard: tuple[int, int] = (1, 1)
    """(K, N): only the cases of shard K of N are tried. Every case is in exactly one of the N shards."""

    def includes(self, name: str) -> bool:
        """Return whether a case is tried. name: its name and dtype, e.g. `shape=[64, 64] rows=[1] rank=1 bfloat16`."""
        return self.case in name

    def is_in_shard(self, name: str) -> bool:
        """Return whether a case is in the shard. name: its target, name and dtype.

        The shard depends on the name alone, so a new case does not move the others.
        """
        number, shards = self.shard
        return zlib.crc32(name.encode()) % shards == number - 1

    @property
    def is_whole(self) -> bool:
        """True if `case`, `checks` and `shard` are not set."""
        return not (self.case or self.checks or self.shard != (1, 1))

    @property
    def is_wide(self) -> bool:
        """True if `wide` or `full` is set, or if `drawn` is above 0: each of them adds everything that `wide` adds."""
        return self.wide or self.full or self.drawn > 0

    @property
    def options(self) -> list[str]:
        """Return the options of `check` that make this selection."""
        chosen = {"--full": self.full, "--wide": self.wide, f"--drawn {self.drawn} --seed {self.seed}": self.drawn > 0}
        of_case = [f"--case {shlex.quote(self.case)}"] if self.case else []
        of_checks = [f"--check {name}" for name in self.checks]
        of_shard = [f"--shard {self.shard[0]}/{self.shard[1]}"] if self.shard != (1, 1) else []
        return [*(option for option, is_given in chosen.items() if is_given), *of_case, *of_checks, *of_shard]


FEW = CaseSelection()
