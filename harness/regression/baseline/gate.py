"""The verbs `gate` and `baseline`, behind their options. No torch."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from harness.analysis.comparison import against_baseline
from harness.analysis.comparison.baseline_rows import Margins
from harness.analysis.run_facts import analyse
from harness.console import echo
from harness.errors import Exit
from harness.records import store
from harness.regression.baseline import store as baselines
from harness.regression.outputs import document, terminal
from harness.regression.outputs.files import Outputs


def gate(
    name: str, baseline: str, margins: Margins, outputs: Outputs, *, as_json: bool = False, all_rows: bool = False,
    strict: bool = False,
) -> Exit:  # fmt: skip
    """Compare a run with a baseline, tell it, return the exit code. all_rows: rows that are the same in both too.

    Raises UsageError for a run, baseline or file that is not there; StoreError where a run.json cannot be read.
    """
    outputs.refuse()
    kept, path = baselines.find(baseline), store.find_run(name)
    with _without_cycles():
        base, new = store.read_run(kept.path), store.read_run(path)
        against = against_baseline.judge(analyse(base), analyse(new), margins=margins, strict=strict)
        title = f"{new.manifest.run} against {kept.name}"
        title += ", which is the same run" if new.manifest.run == base.manifest.run else ""
        outputs.write(against, title)
        if as_json:
            echo(json.dumps(document.document(against, kept, new), indent=1))
        else:
            echo("\n".join([f"{title}: {_origin(kept)}", "", *terminal.lines(against, everything=all_rows)]))
        outputs.annotate(against)
    return against.exit


def promote(name: str, baseline: str, *, reason: str, author: str, replace: bool) -> Exit:
    """Make a run a baseline, and say what to commit."""
    run = store.read_run(store.find_run(name))
    made = baselines.promote(run, baseline, reason=reason, author=author, replace=replace)
    echo(f"{made.path}: {len(run.latest())} Cells of {run.manifest.run}")
    print(f"commit it: git add {made.path} && git commit", file=sys.stderr)
    return Exit.PASS


def list_(as_json: bool) -> Exit:
    """Print the baselines there are."""
    known = baselines.known()
    if as_json:
        rows = [
            {"name": b.name, "path": str(b.path), "why": b.why}
            | ({} if b.provenance is None else b.provenance.model_dump(mode="json", by_alias=True))
            for b in known
        ]
        echo(json.dumps({"schema": document.SCHEMA, "baselines": rows}, indent=1))
        return Exit.PASS
    for b in known:
        echo(f"{b.name}: {_origin(b)}")
    if not known:
        print(
            f"no baseline in {baselines.BASELINES}: `peft-harness baseline promote RUN NAME --reason ...`",
            file=sys.stderr,
        )
    return Exit.PASS


def _origin(baseline: baselines.Baseline) -> str:
    kept = baseline.provenance
    if kept is None:
        return f"of unknown origin ({baseline.why})"
    code = ", ".join(kept.git_shas[:1] or kept.code_versions[:1])[:12]
    return f"run {kept.run} at {code or 'unknown code'}, promoted {kept.promoted} by {kept.author}: {kept.reason}"


@contextmanager
def _without_cycles() -> Iterator[None]:
    """Keep the collector of cycles from looking again and again at thousands of Records, none of which is in a cycle."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.freeze()  # or its first look would be at all that was read
            gc.enable()
