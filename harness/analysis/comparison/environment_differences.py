"""Differences of environment and assets between a run and its baseline, each listed once for all Cells that share it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from harness.analysis.comparison import reproducibility
from harness.analysis.comparison.baseline_rows import ComparisonRow, FindingKind
from harness.analysis.measurements import training_gpu
from harness.analysis.verdict_kind import VerdictKind
from harness.errors import plural
from harness.records.record import Environment, Record

_CODE = ("code version: ", "commit: ", "uncommitted changes: ")
"""Differences that a gate is meant to compare."""


def rows(pairs: Sequence[tuple[Record, Record]]) -> Iterator[ComparisonRow]:
    """Group Cells by their differences in environment and assets; then compare the clocks of the GPUs over all Cells."""
    surroundings: dict[tuple[str, ...], list[tuple[Record, Record]]] = {}
    assets: dict[tuple[str, ...], list[tuple[Record, Record]]] = {}
    for base, new in pairs:
        surroundings.setdefault(tuple(_surroundings(base, new)), []).append((base, new))
        assets.setdefault(tuple(reproducibility.asset_differences(base, new)), []).append((base, new))
    for lines, same in surroundings.items():
        if lines:
            code = all(line.startswith(_CODE) for line in lines)
            yield _row(FindingKind.ENVIRONMENT, VerdictKind.PASS if code else VerdictKind.INCONCLUSIVE, lines, same)
    for lines, same in assets.items():
        if lines:
            yield _row(FindingKind.ASSETS, VerdictKind.INCONCLUSIVE, lines, same)
    clocks = [clocks_of(side) for side in zip(*pairs, strict=True)]
    if len(clocks) == 2 and clocks[0] != clocks[1]:
        line = f"SM clock as training ended: {clocks[0]}, {clocks[1]}"
        yield _row(FindingKind.ENVIRONMENT, VerdictKind.PASS, [line], pairs)


def _row(
    kind: FindingKind, word: VerdictKind, lines: Iterable[str], pairs: Sequence[tuple[Record, Record]]
) -> ComparisonRow:
    cells = tuple(base.cell_id for base, _ in pairs)
    return ComparisonRow(kind, word, plural(len(cells), "Cell"), cells, kind.value, "; ".join(lines))


def _surroundings(base: Record, new: Record) -> list[str]:
    # An unknown value is no difference: older Records, and Records of Cells that ended early, have fewer fields.
    found = [line for line in reproducibility.surroundings(base, new) if "not recorded" not in line]
    a, b = base.environment, new.environment
    if a.git_sha != b.git_sha:
        found.append(f"commit: {a.git_sha[:12] or 'none'}, {b.git_sha[:12] or 'none'}")
    if a.git_dirty != b.git_dirty:
        found.append(f"uncommitted changes: {_dirty(a)}, {_dirty(b)}")
    return found + slowed(base, new)


def slowed(base: Record, new: Record) -> list[str]:
    """Return the causes of throttling in training, where they differ between two Records."""
    before, now = _throttled(base), _throttled(new)
    return [f"GPU throttled in training by: {before or 'nothing'}, {now or 'nothing'}"] if before != now else []


def _dirty(e: Environment) -> str:
    return "unknown" if e.git_dirty is None else "yes" if e.git_dirty else "no"


def _throttled(record: Record) -> str:
    gpu = training_gpu(record)
    states = [s for s in (gpu.start, gpu.end) if s is not None] if gpu else []
    return ", ".join(sorted({why for s in states for why in s.throttle or () if why != "idle"}))


def clocks_of(records: Sequence[Record]) -> str:
    """Return the range of the clocks in MHz; empty without a GPU."""
    gpus = [gpu for r in records if (gpu := training_gpu(r)) is not None]
    found = sorted({gpu.end.sm_clock_Hz // 10**6 for gpu in gpus if gpu.end and gpu.end.sm_clock_Hz})
    return "" if not found else f"{found[0]:,} MHz" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,} MHz"
