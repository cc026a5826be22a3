"""Folders with saved models of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def saved(model: Any, tokenizer: Path, folder: Path) -> Path:
    """Save a model of transformers, add the files of a tokenizer, and return the folder."""
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder
