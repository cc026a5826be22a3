"""Typed facts about a Record, and their text in Records from before the fields."""

from __future__ import annotations

import pytest

from harness.records.notes import concurrency_note, concurrent_cells, notes_of_kind
from harness.records.record import Note, NoteKind, Record
from support import recorded_run

EXPERTS = (
    "the experts are stacked weights and no linear layers: 8 of 9 weights ("
    "89%) are neither adapted nor packed into 4 bits"
)


@pytest.fixture
def record() -> Record:
    return recorded_run.record("fused", recorded_run.cells()["fused"], "run")


def test_an_old_record_tells_by_its_notes(record: Record) -> None:
    assert (concurrent_cells(record), notes_of_kind(record, NoteKind.UNREACHED_EXPERTS)) == (1, [])
    old = record.model_copy(update={"notes": ["of no matter", *concurrency_note(4), EXPERTS]})
    assert old.concurrent_cells is None
    assert concurrent_cells(old) == 4
    assert notes_of_kind(old, NoteKind.UNREACHED_EXPERTS) == [EXPERTS]


def test_a_new_record_tells_by_its_fields_alone(record: Record) -> None:
    note = Note(kind=NoteKind.UNREACHED_EXPERTS, text="8 weights")
    new = record.model_copy(
        update={"notes": [*concurrency_note(4), EXPERTS], "typed_notes": [note], "concurrent_cells": 2}
    )
    assert concurrent_cells(new) == 2
    assert notes_of_kind(new, NoteKind.UNREACHED_EXPERTS) == ["8 weights"]
    assert Record.model_validate_json(new.model_dump_json(by_alias=True)) == new
