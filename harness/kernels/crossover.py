"""The sizes at which one way of computing an Operation becomes faster than another, per card.

A table is a JSON file in `crossovers/`: `default.json`, or a file with the name of a card (see `file_name`) that
`peft-harness bench --crossovers` has measured. The environment variable PEFT_HARNESS_CROSSOVERS names a folder whose
tables come first. So a measured table can be tried without changing the package.
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

VARIABLE = "PEFT_HARNESS_CROSSOVERS"
_PACKAGED = Path(__file__).with_name("crossovers")
_DEFAULT = "default.json"


def file_name(card: str) -> str:
    """Return the name of a card's table, e.g. `nvidia-h100-80gb-hbm3.json`."""
    return f"{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-')}.json"


@cache
def card(device: torch.device) -> str:
    """Return the name of a GPU, as its driver says it. For any other device, return an empty string."""
    import torch  # late, because `night` names cards and starts fast

    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


@cache
def most_tokens(operation: str, on: str, E: int) -> int:
    """Return the largest number of tokens for which the first way is faster, for a weight of E rows. 0 means none.

    on: name of the card; empty for the default. The row of the table with the largest number of rows up to E decides.
    A table that lacks the Operation is ignored.
    """
    folders = [Path(named)] if (named := os.environ.get(VARIABLE)) else []
    for file in (*(folder / file_name(on) for folder in (*folders, _PACKAGED) if on), _PACKAGED / _DEFAULT):
        if file.is_file() and (table := json.loads(file.read_text()).get(operation)):
            rows = sorted(((row["E"], row["tokens"]) for row in table["rows"]), reverse=True)
            return next((tokens for least, tokens in rows if least <= E), 0)
    return 0
