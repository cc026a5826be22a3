"""Which names fit no layer of a model: it is built from its config on the meta device, without weights.

Run as `python -m harness.assets.structure FOLDER KIND NAME...`; the last line printed is JSON, name to sentence.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any


def misfits(folder: str, kind: str, names: Sequence[str]) -> dict[str, str]:
    """Map those of `names` that fit no layer which a method can adapt to a sentence about it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    factory: Any = AutoModelForSequenceClassification if kind == "encoder" else AutoModelForCausalLM
    with torch.device("meta"):
        model = factory.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    return of_model(model, names)


def of_model(model: Any, names: Sequence[str]) -> dict[str, str]:
    """Return the same of a model that is built already."""
    from reference.layers import KINDS, targets

    found = {}
    for name in names:
        try:
            targets(model, (name,), KINDS)
        except ValueError as error:
            found[name] = str(error)
    return found


if __name__ == "__main__":
    print(json.dumps(misfits(sys.argv[1], sys.argv[2], sys.argv[3:])))
