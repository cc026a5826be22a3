"""The verb `history settle`: try by pairs of runs what the nights make one suspect, and write down what came of it."""

from __future__ import annotations

import json
import secrets
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.analysis import tracked_metrics
from harness.analysis.statistics.paired import PairFinding
from harness.analysis.tracked_metrics import STEP
from harness.console import say
from harness.errors import Exit, HarnessError
from harness.records import store
from harness.regression.history import decisions, night_files
from harness.regression.history.cell_names import picked
from harness.regression.history.decisions import EVERY, Verdict
from harness.regression.history.detect import document
from harness.regression.pairs import gate


def settle(
    folder: Path, cell: str | None, most: int, author: str | None, out: Path | None, suite: Path | None = None
) -> Exit:
    """Run the pairs, print a line for each; see the help of the verb. Raises UsageError for what fits no Cell.

    suite: the file of the nights' suite, where it is not one that ships. The first pairs come with a canary.
    """
    author = decisions.who(author)  # before anything runs whose verdict nobody could then sign
    history = night_files.read(folder)
    found = document(history, only=picked(history, cell) if cell else None)
    open_ = [c for c in (*found["suspects"], *found["candidates"]) if _is_open(c)]
    mine = sorted((c for c in open_ if _by_pairs(c)), key=_by_size)
    runs = out or store.RUNS / f"{store.now().replace(':', '').replace('-', '')}-settle-{secrets.token_hex(3)}"
    codes: list[Exit] = []
    watched_over = False  # by a canary
    for number, one in enumerate(mine[:most]):
        where = next(night.places[one["place"]] for night in history.nights if one["place"] in night.places)
        asked = {"canary": not watched_over} | ({"suite": str(suite)} if suite else {})
        code, cut = _tried(folder, one, where, author, runs / str(number), asked)
        watched_over = watched_over or (runs / str(number) / gate.DOCUMENT).exists()
        codes.append(code)
        if cut:
            break
    for line in _left(open_, mine, len(codes)):
        say(line)
    if not open_:
        say("nothing to try: no time lies above its level")
    return max(codes, default=Exit.PASS)


def _is_open(c: Mapping[str, Any]) -> bool:
    return c["settled"] is None and c["standing"] in ("suspect", "candidate")


def _by_pairs(c: Mapping[str, Any]) -> bool:
    """Say whether pairs settle it: a time of one Cell. What all Cells have in common no Cell can speak for."""
    return tracked_metrics.kind(c["metric"]) == "timed" and c["cell"] != EVERY and bool(c["between"]["confirm"])


def _by_size(c: Mapping[str, Any]) -> float:
    return -abs(float(c["change"]))


def _tried(
    folder: Path, c: Mapping[str, Any], where: Mapping[str, str], author: str, out: Path, asked: Mapping[str, Any]
) -> tuple[Exit, bool]:
    """Run the pairs of one change, and write the verdict down if they give one; say whether somebody cut them short."""
    try:
        told = _pairs(c["between"]["confirm"], out, {**asked, "metric": c["metric"]})
    except HarnessError as error:
        say(f"{c['name']}: not tried: {error}")
        return Exit.INFRASTRUCTURE, False
    cell = told["cells"][0] if told["cells"] else {}
    timed = (cell if c["metric"] == STEP else cell.get("latencies", {}).get(c["metric"], {})).get("verdict")
    said, verdict = timed["sentence"] if timed else told["verdict"]["reason"], None
    if timed and told["closed"]:
        said = told["canaries"]
    elif timed and (elsewhere := _elsewhere(where, out)):
        said = f"the pairs ran at another place than the night ({'; '.join(elsewhere)}): {said}"
    elif timed:
        verdict = _verdict(timed["word"], c["worse"])
    if verdict == "refuted" and (libraries := c["between"]["libraries"]):
        verdict, said = None, f"the code alone is not it, and since then {', '.join(libraries)}: {said}"
    if verdict is None:
        say(f"{c['name']}: still open: {said}")
        return (Exit.INFRASTRUCTURE if told["cut"] or not timed else Exit.INCONCLUSIVE), bool(told["cut"])
    seen = {"old_night": c["between"]["old_night"], **{name: c[name] for name in ("place", "before", "after")}}
    line = decisions.confirm(
        folder, c["cell"], c["metric"], c["night"], verdict, f"{said}; seed {told['seed']}", author,
        c["between"]["paired"], seen,
    )  # fmt: skip
    say(f"{c['name']}: {verdict} from {c['night']} on: {line['reason']}")
    return Exit.PASS, bool(told["cut"])


def _verdict(word: str, worse: bool) -> Verdict | None:
    """Return what pairs say of a change; that it went the other way refutes one for the worse."""
    if word == PairFinding.SLOWER:
        return "regressed"
    if word == PairFinding.FASTER:
        return "refuted" if worse else "improved"
    return "refuted" if word == PairFinding.SAME else None


def _elsewhere(where: Mapping[str, str], runs: Path) -> list[str]:
    """List what the place of the process runs in a folder has otherwise, but for Cells that ran beside others."""
    folders = [run for run in sorted(runs.iterdir()) if (run / "run.json").is_file()]
    here = [tracked_metrics.place(record) for run in folders for record in store.read_run(run).records]
    moved = [
        tracked_metrics.moved(where, one | {k: v for k, v in where.items() if k == tracked_metrics.BESIDE})
        for one in here
    ]
    return sorted({what for of_run in moved for what in of_run})


def _pairs(command: str, out: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Run what `detect` would have one run, but as it is `asked`, and return the document of it."""
    words = iter(shlex.split(command)[3:])  # peft-harness gate --pairs OLD NEW --option value ...
    old, new = next(words), next(words)
    options: dict[str, Any] = {name.removeprefix("--"): next(words) for name in words}
    if "cores" in options:
        options["cores"] = int(options["cores"])
    gate.gate(gate.PairsRequest(old, new, out=out, **{**options, **asked}), as_json=False)
    found: dict[str, Any] = json.loads((out / gate.DOCUMENT).read_text(encoding="utf-8"))
    return found


def _left(open_: Sequence[Any], mine: Sequence[Any], tried: int) -> Iterator[str]:
    """Yield a line for what was not tried."""
    for c in mine[tried:]:
        yield f"{c['name']}: not tried, {100 * c['change']:+.1f} %: `{c['between']['confirm']}`"
    for c in open_:
        if c not in mine:
            b = c["between"]
            by_hand = f"only times of single Cells are tried here: `{b['confirm']}`" if b["confirm"] else b["because"]
            yield f"{c['name']}: {c['metric']}: not tried: {by_hand}"
