"""Where Cells run: `local`, `ray`, `slurm`. All three start the same worker command, once per attempt."""

from __future__ import annotations

from collections.abc import Sequence

from harness.errors import UsageError
from harness.runner.executors.executor import Executor


def choose(name: str, jobs: int | None = None, slurm: Sequence[str] = ()) -> Executor:
    """Return the executor of that name. jobs: Cells at a time, None as the executor sees fit; slurm: KEY=VALUE of sbatch."""
    if slurm and name != "slurm":
        raise UsageError(
            "is for --executor slurm", where=f"--slurm {slurm[0]}", hint="leave it out, or add --executor slurm"
        )
    if name == "ray":
        from harness.runner.executors.ray import Ray

        return Ray(jobs)
    if name == "slurm":
        from harness.runner.executors.slurm import Slurm

        return Slurm(jobs, slurm)
    from harness.runner.executors.local import Local

    return Local(jobs or 1)
