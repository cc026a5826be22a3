"""The commands `gate RUN --baseline NAME`, `baseline promote` and `baseline list`. This module imports no torch."""

from __future__ import annotations

from harness.analysis.comparison import against_baseline
from harness.analysis.comparison.baseline_rows import Margins
from harness.analysis.run_facts import analyse
from harness.console import print_json, print_lines, print_note
from harness.errors import Exit
from harness.records import store
from harness.regression import collector
from harness.regression.baseline import store as baselines
from harness.regression.outputs import document, terminal
from harness.regression.outputs.files import Outputs


def gate(
    name: str, baseline: str, margins: Margins, outputs: Outputs, *, as_json: bool = False, all_rows: bool = False,
    strict: bool = False,
) -> Exit:  # fmt: skip
    """Compare a run with a baseline, print the result and return the exit code.

    name: folder or id of the run. baseline: name of a baseline, or the folder of a run; if that run is unfit to be a
    baseline, also print the reasons. all_rows: also print the rows whose value is equal in both runs. Raises UsageError
    if the run or the baseline does not exist, or if an output cannot be written. Raises StoreError if a run.json cannot
    be read.
    """
    outputs.refuse()
    found, path = baselines.find(baseline), store.find_run(name)
    with collector.paused():
        base, new = store.read_run(found.path), store.read_run(path)
        if found.provenance is None:
            for problem in baselines.unfit(base):
                print_note(f"note: {found.path} could not be promoted: {problem.where}: {problem.what}")
        result = against_baseline.judge(analyse(base), analyse(new), margins=margins, strict=strict)
        title = f"{new.manifest.run} against {found.name}"
        title += ", which is the same run" if new.manifest.run == base.manifest.run else ""
        if as_json:
            print_json(document.document(result, found, new))
        else:
            print_lines([f"{title}: {found.origin}", "", *terminal.lines(result, all_rows=all_rows)])
        outputs.write(result, title)
    return result.exit


def promote(name: str, baseline: str, *, reason: str, author: str, replace: bool) -> Exit:
    """Make a run a baseline, print the git command to commit it, and return PASS.

    Raises RefusedError that lists all reasons why the run cannot become this baseline.
    """
    run = store.read_run(store.find_run(name))
    made = baselines.promote(run, baseline, reason=reason, author=author, replace=replace)
    print_lines([f"{made.path}: {len(run.latest())} Cells of {run.manifest.run}"])
    print_note(f"commit it: git add {made.path} && git commit")
    return Exit.PASS


def list_(as_json: bool) -> Exit:
    """Print the baselines, as text or as JSON, and return PASS."""
    known = baselines.known()
    if as_json:
        print_json({"schema": document.SCHEMA, "baselines": [b.document() for b in known]})
        return Exit.PASS
    print_lines(f"{b.name}: {b.origin}" for b in known)
    if not known:
        how = "`peft-harness baseline promote RUN NAME --reason ...`"
        print_note(f"no baseline in {baselines.BASELINES}: {how}")
    return Exit.PASS
