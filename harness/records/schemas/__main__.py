"""Regenerate the schema files."""

from harness.records.schemas import FOLDER, current

for name, text in current().items():
    (FOLDER / name).write_text(text, encoding="utf-8")
