"""PUBLIC_BUGS.md names checks, planted faults and reproductions that exist, and claims no more than the faults show."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import harness.conformance
from harness.conformance import checks, faults
from harness.conformance.findings import defects

TABLE = Path(harness.conformance.__file__).parent / "PUBLIC_BUGS.md"
SERVER = Path(__file__).parents[1] / "support" / "model_server.py"
SERVED_TESTS = Path(__file__).with_name("test_served.py")
SERVED, FROM_SERVER = "check --served", "served: "
UNTRAINED_TESTS = Path(__file__).parents[1] / "runner" / "test_untrained.py"
STATES = "caught in part", "caught", "not yet"
FAULTS = {(fault.target, fault.name): fault for fault in faults.every()}


def rows(columns: int) -> Iterator[list[str]]:
    """Yield the cells of each row of the tables with this number of columns, without their headers."""
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == columns and cells[-1] not in ("state", "script", "---"):
            yield cells


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_named_check_and_fault_exists_and_the_fault_is_expected_of_the_check() -> None:
    tables = list(rows(4))
    assert len(tables) > 30
    for bug, check, fault, state in tables:
        tried, _, target = check.partition(" of ")
        if SERVED in check:
            made, planted_in = SERVER.read_text(encoding="utf-8"), SERVED_TESTS.read_text(encoding="utf-8")
            assert not fault or fault.startswith(FROM_SERVER), bug
            assert all(f'fault == "{name}"' in made or f'fault != "{name}"' in made for name in names(fault)), bug
            assert all(f'"{name}"' in planted_in for name in names(fault)), bug
        elif check.startswith("Cell outcome"):
            assert all(f"def {name}(" in UNTRAINED_TESTS.read_text(encoding="utf-8") for name in names(fault)), bug
        else:
            assert set(names(tried)) <= set(checks.every()), bug
            for name in names(fault):
                planted = FAULTS[names(target)[0] if target else "adapter_files", name]
                assert set(planted.expected) & set(names(tried)), (bug, name)
        assert state.startswith("caught" if fault else "not yet: "), bug


def test_the_counts_above_the_tables_are_those_of_the_tables() -> None:
    caught: dict[str, list[str]] = {}
    for bug, _, _, state in rows(4):
        project = ""
        for named, number in re.findall(r"([\w-]+)?#(\d+)", bug):
            project = named or project
            caught.setdefault(f"{project}#{number}", []).append(next(one for one in STATES if state.startswith(one)))
    of_each = [one[0] if len({*one}) == 1 else STATES[0] for one in caught.values()]
    total, (part, whole, none) = len(of_each), map(of_each.count, STATES)
    sentence = f"Of the {total} reports below, {whole} are caught, {part} are caught in part, and {none} are not"
    assert sentence in TABLE.read_text(encoding="utf-8")


def test_every_defect_has_its_reproduction_among_the_known_ones() -> None:
    found = list(rows(3))
    assert found
    for _, check, script in found:
        tried, _, target = check.partition(" of ")
        begins = tuple(f"{names(target)[0] if target else 'adapter_files'}/{name}/" for name in names(tried))
        named = [one for one in defects.known() if one.library == "peft" and [one.reproduction] == names(script)]
        patterns = [pattern for one in named for pattern in one.checks]
        assert any(pattern.startswith(begins) for pattern in patterns), script
