"""The verb `history settle`: try by pairs of runs what the nights make one suspect, and write down what came of it."""

from __future__ import annotations

import json
import secrets
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import store
from harness.analysis.paired import Finding
from harness.analysis.watched import STEP
from harness.errors import Exit, HarnessError
from harness.gate import pair_command
from harness.history import decisions, files
from harness.history.decisions import Verdict
from harness.history.detect import document
from harness.history.names import picked
from harness.last_words import say

_VERDICTS: Mapping[str, Verdict] = {
    Finding.SLOWER: "regressed", Finding.FASTER: "improved", Finding.SAME: "refuted",
}  # fmt: skip


def settle(folder: Path, cell: str | None, most: int, author: str | None, out: Path | None) -> Exit:
    """Run the pairs, print a line for each; see the help of the verb. Raises UsageError for what fits no Cell."""
    author = decisions.who(author)  # before anything runs whose verdict nobody could then sign
    history = files.read(folder)
    found = document(history, only=picked(history, cell) if cell else None)
    open_ = [c for c in (*found["suspects"], *found["candidates"]) if _is_open(c)]
    mine = sorted((c for c in open_ if c["metric"] == STEP and c["between"]["confirm"]), key=_by_size)
    runs = out or store.RUNS / f"{store.now().replace(':', '').replace('-', '')}-settle-{secrets.token_hex(3)}"
    codes: list[Exit] = []
    for number, one in enumerate(mine[:most]):
        code, cut = _tried(folder, one, author, runs / str(number))
        codes.append(code)
        if cut:
            break
    for line in _left(open_, mine, len(codes)):
        say(line)
    if not open_:
        say("nothing to try: no step time lies above its level")
    return max(codes, default=Exit.PASS)


def _is_open(c: Mapping[str, Any]) -> bool:
    return c["settled"] is None and c["standing"] in ("suspect", "candidate")


def _by_size(c: Mapping[str, Any]) -> float:
    return -abs(float(c["change"]))


def _tried(folder: Path, c: Mapping[str, Any], author: str, out: Path) -> tuple[Exit, bool]:
    """Run the pairs of one change, and write the verdict down if they give one; say whether somebody cut them short."""
    try:
        told = _pairs(c["between"]["confirm"], out)
    except HarnessError as error:
        say(f"{c['name']}: not tried: {error}")
        return Exit.INFRASTRUCTURE, False
    timed = told["cells"][0]["verdict"] if told["cells"] else None
    said = timed["sentence"] if timed else told["verdict"]["reason"]
    verdict = _VERDICTS.get(timed["word"]) if timed and not told["closed"] else None
    if verdict is None:
        why = told["canaries"] if told["closed"] else said
        say(f"{c['name']}: still open: {why}")
        return (Exit.INFRASTRUCTURE if told["cut"] or not timed else Exit.INCONCLUSIVE), bool(told["cut"])
    line = decisions.confirm(
        folder, c["cell"], c["metric"], c["night"], verdict, f"{said}; seed {told['seed']}", author,
        c["between"]["revisions"],
    )  # fmt: skip
    say(f"{c['name']}: {verdict} from {c['night']} on: {line['reason']}")
    return Exit.PASS, bool(told["cut"])


def _pairs(command: str, out: Path) -> dict[str, Any]:
    """Run what `detect` would have one run, and return the document of it."""
    words = iter(shlex.split(command)[3:])  # peft-harness gate --pairs OLD NEW --option value ...
    old, new = next(words), next(words)
    options: dict[str, Any] = {name.removeprefix("--"): next(words) for name in words}
    pair_command.gate(pair_command.Asked(old, new, out=out, canary=False, **options), as_json=False)
    found: dict[str, Any] = json.loads((out / pair_command.DOCUMENT).read_text(encoding="utf-8"))
    return found


def _left(open_: Sequence[Any], mine: Sequence[Any], tried: int) -> Iterator[str]:
    """Yield a line for what was not tried."""
    for c in mine[tried:]:
        yield f"{c['name']}: not tried, {100 * c['change']:+.1f} %: `{c['between']['confirm']}`"
    for c in open_:
        if c not in mine:
            yield f"{c['name']}: {c['metric']}: not by pairs: {c['between']['because'] or 'they do not judge it'}"
