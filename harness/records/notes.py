"""Read facts that older Records have only as text in their notes."""

from __future__ import annotations

import re

from harness.records.record import NoteKind, Record

_OLD_CONCURRENCY = re.compile(r"up to (\d+) Cells ran at once")
_OLD_TEXTS = {NoteKind.UNREACHED_EXPERTS: "are neither adapted nor packed into 4 bits"}
"""Text that every note of a kind contains. It identifies such notes in a Record without `typed_notes`."""


def concurrency_note(cells: int) -> list[str]:
    """Return a list with the note that up to `cells` Cells ran at once. If `cells` is 1, return an empty list."""
    return [f"up to {cells} Cells ran at once: the times are those of a shared machine"] if cells > 1 else []


def concurrent_cells(record: Record) -> int:
    """Return how many Cells, this one included, may have run on the Record's machine at the same time."""
    if record.concurrent_cells is not None:
        return record.concurrent_cells
    return next((int(found[1]) for note in record.notes if (found := _OLD_CONCURRENCY.search(note))), 1)


def notes_of_kind(record: Record, kind: NoteKind) -> list[str]:
    """Return the texts of a Record's notes of one kind."""
    if record.concurrent_cells is not None:  # Records have had this field as long as typed_notes
        return [note.text for note in record.typed_notes if note.kind is kind]
    return [note for note in record.notes if _OLD_TEXTS[kind] in note]
