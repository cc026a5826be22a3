"""Measures: peak memory of the training step of a Cell (a training setup), with the full-sized model on fake tensors.

Fake tensors have no data. Imports torch only when a measure is computed.
"""

from __future__ import annotations

import json
from functools import cache

from harness.assets import shapes
from harness.claims import record_sources
from harness.claims.measure import MeasureResult, NotRunError, measure
from harness.claims.measures.records import Entry, SuiteName, predicted, shape_of


@measure("bytes")
def step_peak(suite: SuiteName, cell: Entry) -> MeasureResult:
    """Peak memory of tensors in a training step of a Cell.

    The step's CPU code runs on fake tensors, so a model of any size works. Texts have their maximum length. The peak
    does not include paged states (which are in host memory), workspaces, the overhead of the allocator, or CUDA's
    context.
    """
    own = record_sources.cell(suite, cell)
    peak, by = _peak(suite, cell)
    host = predicted(own).optimizer_host_B
    how = f"a training step of {own.label} on fake tensors, in CPU code of {by or 'the Cell'}: {peak:,} B"
    return MeasureResult(peak - host, f"{how}, with {host:,} B of paged states in host memory" if host else how)


@measure("bytes")
def step_peak_more(suite: SuiteName, of: Entry, than: Entry) -> MeasureResult:
    """Difference of the peak memory of two Cells' training steps: `of` minus `than`, each as in `step_peak`."""
    a, b = step_peak(suite, of), step_peak(suite, than)
    return MeasureResult(a.value - b.value, f"{a.value:,} B - {b.value:,} B: {a.how}; {b.how}")


@cache
def _peak(suite: str, entry: str) -> tuple[int, str]:
    from harness.memory_model import dry_step, isolated_step

    cell = record_sources.cell(suite, entry)
    if not cell.model.startswith(shapes.PREFIX):
        raise NotRunError(f"`cell` must have a shape as its model; {cell.model} has its weights in files")
    config, kind = shape_of(cell)
    isolated_step.import_classes(json.dumps(config), kind)
    found = isolated_step.peak(cell, config, kind, dry_step.longest_batches(cell, kind, cell.training.max_tokens))
    if "peak_B" not in found:
        raise NotRunError(f"the step cannot run on fake tensors: {found.get('no_peak', 'this Cell trains nothing')}")
    return int(found["peak_B"]), str(found["peak_by"])
