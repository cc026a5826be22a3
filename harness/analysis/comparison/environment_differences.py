"""Rows for differences in environment and assets between a run and its baseline.

All Cells with the same differences share a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from harness.analysis.comparison import reproducibility
from harness.analysis.comparison.baseline_rows import ComparisonRow, RowKind
from harness.analysis.comparison.reproducibility import CODE_VERSION, Difference
from harness.analysis.grouping import group
from harness.analysis.measurements import training_gpu
from harness.analysis.verdict_kind import VerdictKind
from harness.errors import plural
from harness.records.record import Environment, Record

CLOCK = "SM clock at the end of training"
_CODE = (CODE_VERSION, "commit", "uncommitted changes")
"""Names of the differences in the code. Such a difference alone does not make a row inconclusive, because a regression
gate compares two versions of the code."""
_Records = Sequence[tuple[Record, Record]]


def rows(pairs: _Records) -> Iterator[ComparisonRow]:
    """Yield the rows for the environments, then for the assets.

    pairs: for each Cell, its Record in the baseline and its Record in the run. The GPU clocks are compared over all
    Cells together: if their ranges in the baseline and the run differ, a last row shows both ranges.
    """
    for kind, differences in (
        (RowKind.ENVIRONMENT, _surroundings),
        (RowKind.ASSETS, reproducibility.asset_differences),
    ):
        for found, same in group((tuple(differences(*pair)), pair) for pair in pairs).items():
            if found:
                code_only = kind is RowKind.ENVIRONMENT and all(d.what in _CODE for d in found)
                yield _row(kind, VerdictKind.PASS if code_only else VerdictKind.INCONCLUSIVE, found, same)
    clocks = [clocks_of(side) for side in zip(*pairs, strict=True)]
    if len(clocks) == 2 and clocks[0] != clocks[1]:
        yield _row(RowKind.ENVIRONMENT, VerdictKind.PASS, [Difference(CLOCK, *clocks)], pairs)


def _row(kind: RowKind, word: VerdictKind, found: Iterable[Difference], pairs: _Records) -> ComparisonRow:
    cells = tuple(base.cell_id for base, _ in pairs)
    return ComparisonRow(kind, word, plural(len(cells), "Cell"), cells, kind.value, "; ".join(map(str, found)))


def _surroundings(base: Record, new: Record) -> list[Difference]:
    # An unknown value is no difference: older Records, and Records of Cells that ended early, have fewer fields.
    found = [difference for difference in reproducibility.surroundings(base, new) if difference.recorded]
    a, b = base.environment, new.environment
    if a.git_sha != b.git_sha:
        found.append(Difference("commit", a.git_sha[:12] or "none", b.git_sha[:12] or "none"))
    if a.git_dirty != b.git_dirty:
        found.append(Difference("uncommitted changes", _dirty(a), _dirty(b)))
    return found + throttling(base, new)


def throttling(base: Record, new: Record) -> list[Difference]:
    """Compare the reasons for which the GPU was throttled during training.

    Return a list with one Difference, or an empty list if the reasons are equal.
    """
    before, now = _throttle_reasons(base) or "nothing", _throttle_reasons(new) or "nothing"
    return [Difference("GPU throttled in training by", before, now)] if before != now else []


def _dirty(e: Environment) -> str:
    return "unknown" if e.git_dirty is None else "yes" if e.git_dirty else "no"


def _throttle_reasons(record: Record) -> str:
    gpu = training_gpu(record)
    states = [s for s in (gpu.start, gpu.end) if s is not None] if gpu else []
    return ", ".join(sorted({why for s in states for why in s.throttle or () if why != "idle"}))


def clocks_of(records: Sequence[Record]) -> str:
    """Return the lowest and highest GPU clock at the end of training, e.g. `1,410 to 1,980 MHz`.

    Without a GPU, return an empty string.
    """
    gpus = [gpu for r in records if (gpu := training_gpu(r)) is not None]
    found = sorted({gpu.end.sm_clock_Hz // 10**6 for gpu in gpus if gpu.end and gpu.end.sm_clock_Hz})
    return "" if not found else f"{found[0]:,} MHz" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,} MHz"
