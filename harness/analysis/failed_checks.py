"""Find the failed checks of a Record, and the times that may not be shown because of them."""

from __future__ import annotations

from harness.records.record import CheckResult, Outcome, Record


def failed(record: Record) -> list[CheckResult]:
    """Return the failed checks of a Record."""
    return [check for check in record.unpassed if check.outcome is Outcome.FAIL]


def checks_run_here(record: Record) -> list[CheckResult]:
    """Return the checks that ran in the attempt of this Record.

    A Cell may reuse the parity gate, i.e. the checks before training, of an earlier Cell, and its check of merged weights.
    Reused results are left out.
    """
    return record.checks[record.gate.checks :] if record.gate and record.gate.record else record.checks


def nonconforming(record: Record) -> bool:
    """Return whether a Record departs from its Method: its status says so, or one of its checks failed.

    Failed checks of a server count too.
    """
    return record.status.departs or bool(failed(record))


def of_serving(check: CheckResult) -> bool:
    """Return whether a check judges the server of a Cell (e.g. vLLM), and not the code of the Method.

    If such a check fails, the times of the server are left out. All other times stay valid.
    """
    return check.id.check.startswith("served-")


def only_of_serving(record: Record) -> bool:
    """Return whether a Record has failed checks, and all of these checks judge a server."""
    return bool(found := failed(record)) and all(map(of_serving, found))


def diverged(record: Record) -> bool:
    """Return whether training reached NaN or infinity. The usual cause is the recipe, not the Method's code."""
    return record.failure is not None and record.failure.kind == "Diverged"


def unreferenced(record: Record) -> str:
    """Return the reason why no speed is shown for a Record whose Cell had no reference to compare with.

    For any other Record, return an empty string.
    """
    skipped = (c for c in record.unpassed if c.outcome is Outcome.SKIPPED and c.id.check == "reference")
    return next((f"no speed without parity: {check.detail}" for check in skipped), "")


def no_speed(record: Record) -> str:
    """Return the reason why no time of this Cell may be shown. If times may be shown, return an empty string."""
    own = [c for c in failed(record) if not (c.of_merging or _of_mixing(c) or of_serving(c))]
    return _refusal(own) or unreferenced(record)


def no_merged_speed(record: Record) -> str:
    """Return the reason why no time of the merged model may be shown. If times may be shown, return an empty string."""
    return no_speed(record) or _refusal([c for c in failed(record) if c.of_merging])


def no_mixed_speed(record: Record) -> str:
    """Return the reason why no time of a batch with several adapters may be shown.

    If such times may be shown, return an empty string.
    """
    return no_speed(record) or _refusal([c for c in failed(record) if _of_mixing(c)])


def _of_mixing(check: CheckResult) -> bool:
    return check.id.check == "multi-adapter"


def _refusal(failed: list[CheckResult]) -> str:
    return f"no speed without parity: {', '.join(c.check for c in failed)} failed" if failed else ""
