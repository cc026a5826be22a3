"""Find or make the folder from which a model server loads the base model of a Cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from harness.cell.job import Job
from harness.cell.training import random_model
from harness.conformance.subject import DTYPES


def find(job: Job, new: Path) -> Path:
    """Return the folder of a Cell's base model.

    If the model is only a config.json without weights, save it into `new`, with the same random weights as in the Cell,
    and return `new`. Servers need a tokenizer, so `new` also gets one, with a word for every token. The harness itself
    sends only token ids.
    """
    given = Path(job.model.path)
    if job.model.source.scheme != "shape":
        return given
    model: Any = random_model.build(given, DTYPES[job.cell.dtype])
    random_model.draw(model, torch.device(job.device))
    model.save_pretrained(new)
    words = {f"word{number}": number for number in range(model.config.vocab_size)}
    unknown = next(iter(words))
    tokenizer = Tokenizer(WordLevel(words, unk_token=unknown))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown).save_pretrained(new)
    return new
