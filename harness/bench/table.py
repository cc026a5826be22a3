"""Write the results of `bench` as a table of aligned text, with notes below it. This module imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from harness.analysis.statistics.intervals import fewest_with_interval
from harness.bench.results import TIMED_CALL, BenchRow, Ceilings
from harness.bench.steps import PRODUCTS
from harness.conformance.findings.outcomes import CheckStatus
from harness.console import align_columns

_HEAD = ("benchmark", "shape", "dtype", "on", "{0}", "other", "", "other/{0}", "limit", "memory", "parity")


def lines(rows: Sequence[BenchRow]) -> list[str]:
    """Return the table and the notes below it as lines of text."""
    ours = rows[0].ours if rows else "ours"
    table = [tuple(head.format(ours) for head in _HEAD), *(fields(row) for row in rows)]
    below = notes(rows)
    return [*align_columns(table, indent=""), *([""] if below else []), *below]


def fields(row: BenchRow) -> tuple[str, ...]:
    """Return the text of each column of a row.

    If the row was not measured, the last column has the outcome and the reason.
    """
    start = (row.name, row.shape, row.dtype, row.device)
    if row.outcome != "measured" or row.samples is None:  # a step is `failed`, with samples, if its memory is unknown
        return (*start, "-", row.other, "-", "-", "-", "-", f"{row.outcome}: {row.because}")
    ours, other = median(row.samples.ours), median(row.samples.other)
    return (
        *start, _time(ours) + _mark(row, "ours"), row.other, _time(other) + _mark(row, "other"), _ratio(row), _limit(row),
        _memory(row), _parity(row),
    )  # fmt: skip


def _mark(row: BenchRow, side: str) -> str:
    return (" *" if side in row.mostly_call else "") + (" h" if side in row.host_bound else "")


def _ratio(row: BenchRow) -> str:
    ratio = row.ratio
    if ratio is None:
        return "-"
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.2f} [too few]"
    return f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"


def _limit(row: BenchRow) -> str:
    if row.limit_ratio is not None:
        by_flops = "" if row.products_ratio is None else f", {row.products_ratio:.2f} by FLOPs"
        return f"{row.limit_ratio:.2f} x {row.limit}{by_flops}"
    share = row.share(row.samples.ours) if row.samples is not None else None
    return "-" if share is None else f"{share:.0%} of roofline"


def _memory(row: BenchRow) -> str:
    peak, ratio = row.step_memory(row.ours), row.memory_ratio
    return "-" if peak is None or ratio is None else f"{peak / 2**20:.0f} MiB, {ratio:.2f}"


def _parity(row: BenchRow) -> str:
    """Return the text of the column `parity`.

    It names the last check that passed before timing, and says how many more checks passed. It also has the largest
    error, as a share of the error's tolerance, and the known defects.
    """
    passed = [one for one in row.parity if one.status is CheckStatus.PASS and one.check != TIMED_CALL]
    in_order = sorted(passed, key=lambda one: one.implementation == row.ours)
    ids = list(dict.fromkeys(one.result.check for one in in_order))
    shown = ids[-1] + (f" +{len(ids) - 1}" if len(ids) > 1 else "")
    share = max((one.share for one in passed if one.share is not None), default=None)
    defects = sorted({one.defect for one in row.parity if one.defect})
    used = f" {share:.2f}" if share is not None else ""
    return shown + used + (f" (known defect {', '.join(defects)})" if defects else "")


def notes(rows: Sequence[BenchRow]) -> list[str]:
    """Return the notes below the table as lines of text. A line that continues a note is indented by two spaces."""
    measured = [row for row in rows if row.outcome == "measured"]
    found = []
    if measured:
        found += [
            f"other/{measured[0].ours}: median over interleaved pairs with its 95 % interval, within one process; above 1 "
            f"{measured[0].ours} is faster",
            "parity: the last passed check, the number of others, and the largest error as a share of what is allowed",
        ]
    if any(row.ratio.low is None for row in measured if row.ratio is not None):
        found.append(f"[too few]: an interval needs at least {fewest_with_interval()} pairs (--pairs)")
    if counted := [(row, row.products) for row in measured if row.products is not None]:
        found.append(
            "frozen pass: the dense model forward, and backward to its embeddings, without training. By FLOPs: the products "
            "of the step over those of the frozen pass; for the other implementation:"
        )
        found += [f"  {row.name} {row.other}: {products.other / products.frozen:.2f}" for row, products in counted]
    limited = [row for row in measured if row.samples is not None and row.samples.limit]
    if any(row.limit == PRODUCTS for row in limited):
        work = "the gradient into the subspace and the update out of it, without any other work or allocation"
        found.append(f"{PRODUCTS}: {work}")
    if rates := {f"  {row.device} {row.dtype}: {_rates(row.ceilings)}" for row in measured if row.ceilings is not None}:
        found.append("roofline: by the copy and the matrix product measured in the same process as the row:")
        found += sorted(rates)
    if any(row.mostly_call for row in measured):
        found.append(
            "*: a call of tiny size takes a fifth of this time or more, for example because the implementation makes an "
            "optimizer or a layer at each call. Use larger --shapes, or whole training steps (--step)"
        )
    if any(row.host_bound for row in measured):
        found.append(
            "h: the host takes about as long to launch the call as the GPU to run it, or longer. A program then waits for "
            "the host, and a faster kernel changes nothing"
        )
    if any(row.device == "cuda" for row in limited):
        found.append(
            "step: on a large GPU, kernel launches by the host may dominate a step of this small model and its frozen pass; "
            "the ratio need not hold for larger models"
        )
    if busy := [load for row in measured if _number(load := row.facts.get("load")) > _number(row.facts.get("threads"))]:
        found.append(
            f"busy machine: load up to {max(map(_number, busy)):.1f} before a benchmark, which may affect these times"
        )
    if differing := dict.fromkeys(f"  {row.name} {row.shape}: {row.differs}" for row in measured if row.differs):
        found += ["different computations, each judged against its own reference:", *differing]
    if judged := dict.fromkeys(f"  {row.name} {row.shape}: {row.judged}" for row in measured if row.judged):
        found += ["parity judged on a smaller size than was timed:", *judged]
    rechecks = [(row, one) for row in measured for one in row.parity if one.check == TIMED_CALL]
    if unchecked := [
        f"  {row.name} {row.shape}, {one.implementation}: {one.result.detail}"
        for row, one in rechecks
        if one.status is CheckStatus.SKIPPED
    ]:
        found += ["timed, but the timed call was not checked once more:", *unchecked]
    if missing := sum(row.cause == "interrupted" for row in rows):
        found.append(f"interrupted: {missing} of these did not finish, marked `not-run: interrupted`")
    return found


def _rates(ceilings: Ceilings) -> str:
    return f"{ceilings.copy_B_per_s / 1e9:.3g} GB/s, {ceilings.gemm_FLOP_per_s / 1e12:.3g} TFLOP/s"


def _number(fact: object) -> float:
    return float(fact) if isinstance(fact, int | float) else 0.0


def _time(seconds: float) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
