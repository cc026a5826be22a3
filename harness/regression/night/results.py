"""Files of a nightly run (`peft-harness night`).

`night.json` is written first, `parts/<name>.json` as soon as a part (one command) ends, and `footer.json` last.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from harness.records.base_model import FrozenModel
from harness.records.record import Environment, Seconds

SCHEMA = 1
Status = Literal["ok", "finding", "failed", "cut", "not-run"]
"""Status of a part. `ok`: measured. `finding`: measured, and something is wrong or slower. `failed`: the command
crashed, hung or left no results. `cut`: its time was over or the nightly run was interrupted, and its measurements so
far are kept. `not-run`: not started, or nothing was compared."""


class PlannedPart(FrozenModel):
    """A part (one command) in the plan of a nightly run."""

    name: str
    title: str
    command: str
    estimate_s: Seconds
    limit_s: Seconds = 0.0
    """Time limit in seconds if each earlier part takes its estimated time. 0 if the part does not fit into the budget."""


class NightManifest(FrozenModel):
    """Content of night.json: the plan of a nightly run. It is written before anything runs."""

    schema_: int = Field(default=SCHEMA, alias="schema")
    night: str
    """Id of the nightly run."""
    device: Literal["cpu", "cuda"]
    card: str
    """Name of the GPU or of its MIG part, as torch returns it; empty for a CPU."""
    budget_s: Seconds
    parts: list[PlannedPart]
    environment: Environment
    notes: list[str] = Field(default=[])
    """Programs that fail on this machine although the nightly run can do without them, e.g. nvidia-smi."""
    argv: list[str]
    started: str
    """Start in UTC, ISO 8601."""


class PartFailure(FrozenModel):
    """One failure in the output of a part (one command) of a nightly run."""

    where: str
    """Name of the check, benchmark or Cell that failed."""
    what: str
    """The failure in one line. If a kernel raised an exception: the kernel's name, its arguments and its compile
    options."""
    traceback: str = ""
    reproduce: str = ""
    """Command that shows the failure again."""


class PartTable(FrozenModel):
    """Table with the numbers of a part (one command) of a nightly run. All its entries are formatted texts."""

    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = Field(default=[])
    """Lines that explain the table. A line that continues a note is indented by two spaces."""


class PartResult(FrozenModel):
    """Content of parts/<name>.json: status and results of a part (one command) of a nightly run."""

    schema_: int = Field(default=SCHEMA, alias="schema")
    name: str
    title: str
    status: Status
    because: str = ""
    """Reason for a status other than ok, and the processes that the part left behind, if any."""
    command: str
    """The command of the part as a line for a shell."""
    estimate_s: Seconds
    seconds: Seconds | None = None
    """Wall time in seconds; None if the part was not started."""
    cpu_s: Seconds | None = None
    """Processor seconds of all processes of the part; None if it was not started. They show whether a slow part
    computed or waited."""
    limit_s: Seconds | None = None
    """Time limit of the part in seconds; None if it was not started."""
    left_out: bool = False
    """True if the part was cut or not run because the budget was used up or the nightly run was interrupted."""
    exit_code: int | None = None
    summary: str = ""
    table: PartTable | None = None
    failures: list[PartFailure] = Field(default=[])
    files: list[str] = Field(default=[])
    """Pages and logs of the part, relative to the nightly run's folder."""


class NightFooter(FrozenModel):
    """Content of footer.json: the result of a nightly run. It is written last, so an unfinished run has none."""

    schema_: int = Field(default=SCHEMA, alias="schema")
    night: str
    ended: str
    how: Literal["finished", "interrupted"]
    exit: int
    verdict: str
    seconds: Seconds
    counts: dict[str, int]
    """Number of parts with each status."""
    left_out: dict[str, str] = Field(default={})
    """Name of a part -> reason why it was cut or not run: lack of time, or an interruption."""
    sha256: dict[str, str]
    """SHA-256 of night.json and of the file of each part, by file name."""
