"""The data of the task `synthetic`: sequences of random tokens, all of the Cell's `max_tokens`; nothing is scored.

For an encoder each sequence has a random label.
"""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor, nn

from harness.assets import structure
from harness.cell.data import refuse_long
from harness.cell.job import Job
from harness.cell.training import loop
from harness.cell.training import model as models
from harness.cell.training.batches import Batch, Example, collate

_PROBED, _PROBED_TOKENS = 2, 32


class RandomData:
    """A Cell's batches of random tokens: the same for every method of one seed, all of `max_tokens`, no padding.

    The loss is over every token but the first, or of an encoder over the labels. Raises UsageError if the model reads
    fewer tokens.
    """

    cut_examples = None

    def __init__(self, job: Job, loaded: models.Loaded) -> None:
        cell, device = job.cell, torch.device(job.device)
        refuse_long(loaded.model, cell)
        training, vocabulary = cell.training, int(loaded.model.config.vocab_size)
        generator = torch.Generator().manual_seed(cell.seed)
        self._encoder = job.model.source.kind == "encoder"
        if self._encoder:
            structure.without_padding(loaded.model)
        of = "the labels, which are random too" if self._encoder else "every token but the first"
        self.text_rules = f"random tokens; loss of {of}; nothing is scored"

        def sequences(count: int, tokens: int, name: str) -> Batch:
            ids = torch.randint(0, vocabulary, (count, tokens), generator=generator).tolist()
            if self._encoder:
                labels = torch.randint(0, job.task.labels, (count,), generator=generator).tolist()
                examples = [Example(f"{name}-{row}", tuple(ids[row]), label) for row, label in enumerate(labels)]
                return collate(examples, 0, "right").to(device)
            examples = [Example(f"{name}-{row}", tuple(one), 0, tokens - 1) for row, one in enumerate(ids)]
            return collate(examples, 0, "left").to(device)

        self.probe = sequences(_PROBED, min(training.max_tokens, _PROBED_TOKENS), "probe")
        names = [f"random-{cell.seed}-{step}" for step in range(training.steps)]
        self.batches = [sequences(training.batch, training.max_tokens, name) for name in names]
        # With the tokens and labels themselves: the names do not show number and length of the sequences.
        drawn = hashlib.sha256(json.dumps([vocabulary, names]).encode())
        for batch in self.batches:
            drawn.update(json.dumps(batch.inputs["input_ids"].tolist()).encode())
            if self._encoder:
                drawn.update(json.dumps(batch.labels.tolist()).encode())
        self.order_sha256 = drawn.hexdigest()

    def logits(self, model: nn.Module) -> Tensor:
        """Return the logits of two sequences, of a causal model at their last position, differentiably."""
        if self._encoder:
            return model(**self.probe.inputs).logits  # type: ignore[no-any-return]
        return loop.last_logits(model, self.probe.inputs, 1)

    def evaluate(self, model: nn.Module) -> None:
        """Score nothing: the prediction of random tokens or labels means nothing."""
