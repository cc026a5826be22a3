"""JSON documents, tables and exit codes over the published runs: equal to those before the move into packages (849c092).

The files in `documents/` were written by that commit. Prose (any text with a blank in it) is replaced by an ellipsis, so
that wording may change and facts may not.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.cli import main

TOP = Path(__file__).resolve().parents[2]
PUBLISHED = TOP / "results" / "published"
DOCUMENTS = Path(__file__).with_name("documents")
CODES: dict[str, int] = json.loads((DOCUMENTS / "exit-codes.json").read_text(encoding="utf-8"))
OLDER, NEWER = (str(PUBLISHED / f"2026-11-{day}-quick-cpu") for day in (24, 26))

Command = Callable[..., str]


def without_prose(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_prose(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_prose(part) for part in value]
    if isinstance(value, str) and " " in value.strip():
        return "…"
    return "<path>" if isinstance(value, str) and value.startswith("/") else value


def expected(name: str) -> Any:
    return json.loads((DOCUMENTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command in an empty folder, compare its exit code with the old one, and return its stdout."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> str:
        capsys.readouterr()
        code = main(list(arguments))
        printed = capsys.readouterr()
        assert code == CODES[name], printed.err
        return printed.out

    return run


def test_gate_and_baseline(command: Command) -> None:
    command("promote", "baseline", "promote", NEWER, "quick", "--reason", "x")
    for name, run in {
        "gate-equal": NEWER, "gate-older": OLDER, "gate-nothing": str(PUBLISHED / "2026-11-26-claims-small-cpu"),
    }.items():  # fmt: skip
        printed = command(name, "gate", run, "--baseline", "quick", "--json")
        document, old = without_prose(json.loads(printed)), expected(name)
        # When and by whom the baseline was promoted is this test's own.
        assert document.pop("baseline", {}).keys() == old.pop("baseline", {}).keys()
        assert document == old


def test_history(command: Command) -> None:
    command("add-24", "history", "add", OLDER)
    command("add-26", "history", "add", NEWER)
    for name in ("detect", "show"):
        printed = command(f"history-{name}", "history", name, "--json")
        assert without_prose(json.loads(printed)) == expected(f"history-{name}")


def test_export(command: Command, tmp_path: Path) -> None:
    command("export", "export", NEWER, "--format", "csv", "--out", "numbers")
    for table in ("cells", "columns"):
        with (tmp_path / "numbers" / f"{table}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        # Columns may be added; those that there were stay as they are.
        old = expected(f"export-{table}")
        if table == "cells":
            index = [rows[0].index(name) for name in old[0]]
            rows = [[row[i] for i in index] for row in rows]
        else:
            names = {row[1] for row in old}
            # All but the meaning, which is prose.
            rows, old = [row[:-1] for row in rows if row[1] in names], [row[:-1] for row in old]
        assert without_prose(rows) == old


@pytest.mark.parametrize("kind", ["methods", "suites", "models", "tasks", "checks", "measures"])
def test_list(command: Command, kind: str) -> None:
    new, old = without_prose(json.loads(command(f"list-{kind}", "list", kind, "--json"))), expected(f"list-{kind}")
    # Entries may be added, and settings of a Method; those that there were stay as they are.
    there = {row["name"]: row for row in old[kind]}
    new[kind] = [row for row in new[kind] if row["name"] in there]
    for row in new[kind] if kind == "methods" else ():
        row["config"] = {key: row["config"][key] for key in there[row["name"]]["config"]}
    assert new == old


@pytest.mark.parametrize("suite", ["smoke", pytest.param("quick", marks=pytest.mark.slow)])
def test_plan_and_cell_ids(command: Command, suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_HARNESS_CACHE", str(tmp_path))  # no memory is predicted of a model that is not here
    printed = command(f"plan-{suite}", "plan", suite, "--json")
    document, old = json.loads(printed), expected(f"plan-{suite}")
    assert document.keys() == old.keys()
    assert [(cell["cell_id"], cell["id"]) for cell in document["cells"]] == [
        (cell["cell_id"], cell["id"]) for cell in old["cells"]
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_fit(command: Command) -> None:
    some = ("lora", "qlora", "galore", "full", "frozen")
    words = [word for method in some for word in ("--method", method)]
    printed = command("fit", "fit", "llama-7b", "--memory", "24GiB", "--formulas", "--json", *words)
    document, old = without_prose(json.loads(printed)), expected("fit")
    rows = {row["method"]: [] for row in old["rows"]}
    for row in old.pop("rows"):
        rows[row["method"]].append(row)
    assert document.pop("rows") == [row for method in some for row in rows[method]]
    assert document == old


@pytest.mark.nightly
@pytest.mark.usefixtures("forks")
def test_claims(command: Command) -> None:
    printed = command("claims-lora", "claims", "lora", "--tier", "exact", "--json")
    document, old = without_prose(json.loads(printed)), expected("claims-lora")
    # The versions are this machine's. Packages may be added.
    assert document.pop("software").keys() >= old.pop("software").keys()
    assert document == old


@pytest.mark.parametrize(
    "run", sorted(path.parent for path in PUBLISHED.glob("*/run.json")), ids=lambda path: path.name
)
def test_report_of_every_published_run(command: Command, tmp_path: Path, run: Path) -> None:
    copy = tmp_path / run.name
    copy.mkdir()
    for name in ("run.json", "footer.json", "cells"):
        (copy / name).symlink_to(run / name)
    command(f"report-{run.name}", "report", str(copy))
    made, published = (without_date(folder / "report.html") for folder in (copy, run))
    # If a change of the page is meant, make the published page anew: peft-harness report results/published/RUN
    assert made == published


@pytest.mark.parametrize(("page", "option"), [("claims.html", []), ("headlines.html", ["--headlines"])])
def test_published_pages_of_claims_are_made_of_the_published_ledger(
    tmp_path: Path, page: str, option: list[str]
) -> None:
    folder, made = PUBLISHED / "2026-11-30-claims-cpu", tmp_path / page
    assert (
        main(["claims", "--show", str(folder / "claims.json"), *option, "--html", str(made)]) == 1
    )  # not all reproduced
    # If a change of the page is meant, make it anew by this command.
    assert without_date(made) == without_date(folder / page)


def without_date(page: Path) -> str:
    return re.sub(r"Generated \S+Z", "Generated", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [name for name in CODES if name.startswith("bad ")])
def test_wrong_use_has_the_same_exit_code(command: Command, name: str) -> None:
    arguments = name.split(" ")[1:]
    if arguments[0] == "gate":
        arguments.insert(1, NEWER)
    assert command(name, *arguments) == ""
