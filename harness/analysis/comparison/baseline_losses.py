"""Training loss of a Cell compared with the baseline: on the same batches, so that only rounding may differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean

from harness.analysis.comparison.baseline_rows import LOSS, LOSS_SHARE, ComparisonRow, FindingKind
from harness.analysis.verdict_kind import VerdictKind
from harness.records.record import Record


def rows(name: str, base: Record, new: Record) -> Iterator[ComparisonRow]:
    """Compare the losses of two ok Records of one Cell; nothing where either did not train, or on other batches."""
    a, b = (record.measurements.training if record.measurements else None for record in (base, new))
    if a is None or b is None or a.data_order_sha256 != b.data_order_sha256:
        return
    before, now = last_quarter(a.losses), last_quarter(b.losses)
    allowed = before + LOSS_SHARE * abs(before) + LOSS
    ids = (base.id, new.id)
    rose = now > allowed
    says = "rose" if rose else "within the margin" if now != before else ""
    reason = f"{says} (margin {100 * LOSS_SHARE:g} % and {LOSS:g})" if says else ""
    word = VerdictKind.FAIL if rose else VerdictKind.PASS
    yield ComparisonRow(
        FindingKind.LOSS, word, name, (base.cell_id,), "training loss", reason, before, now, "nats", records=ids
    )


def last_quarter(losses: list[float]) -> float:
    """Return the mean over the last quarter of the steps, of one at least."""
    return fmean(losses[-math.ceil(len(losses) / 4) :])
