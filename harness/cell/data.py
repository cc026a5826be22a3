"""The data of a Cell: training batches, probe texts, and the scorer.

Probe texts are the few texts on which the parity gate compares logits of the adapted model with a reference.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from harness.analysis.statistics.intervals import wilson
from harness.assets import rows, structure
from harness.cell.evaluation import classification
from harness.cell.job import Asset, Emit, Job
from harness.cell.measure.latency import positions
from harness.cell.training import loop
from harness.cell.training import model as models
from harness.cell.training.batches import (
    Batch,
    Example,
    Prompts,
    answer_examples,
    answered_examples,
    classification_examples,
    collate,
    order,
    rules,
)
from harness.errors import UsageError
from harness.records.record import Accuracy, Cell
from harness.suites.lm_eval_keys import max_answer_tokens, too_long

_PROBED, _PROBED_CAUSAL = 8, 4
"""Number of probe texts, for an encoder and for a causal model. A causal model gets fewer, because it returns more
logits per text."""
_PROBED_RANDOM, _PROBED_TOKENS = 2, 32
_COMPARED = 8
"""Number of training batches on which the loss of an imported adapter is computed."""


class CellData:
    """The data of a Cell's task: the training batches, the probe texts, and the scorer."""

    def __init__(self, job: Job, loaded: models.Loaded, emit: Emit) -> None:
        cell, task = job.cell, job.task
        if job.data is None:
            raise UsageError(f"task {task.name} has no data", hint="name a task that has data")
        device = torch.device(job.device)
        self._lm_task: Any = None
        if task.file:
            self._lm_task, train_rows, test_rows = _builtin_task(job, job.data)
        else:
            train_rows, test_rows = _split(job, job.data)
        wanted, batch = cell.training.steps, cell.training.batch
        tokenizer, limit = loaded.tokenizer, cell.training.max_tokens
        refuse_long(loaded.model, cell, max_answer_tokens(task.spec) if task.answers else 0)
        self.pad = int(tokenizer.pad_token_id)
        self._cell = cell
        self._progress = lambda done, of: emit("items", done=done, of=of)
        self.text_rules = rules(task.answers)
        if job.model.source.kind == "encoder":
            loaded.model.config.pad_token_id = self.pad

            def tokenise(chosen_rows: Sequence[rows.AnyRow]) -> list[Example]:
                return classification_examples(chosen_rows, tokenizer, limit)

            self._test = tokenise(test_rows)
            side, probe = "right", self._test[:_PROBED]
            refuse_tokenless(self._test, job.model.path, tokenizer.num_special_tokens_to_add())
        else:
            from harness.cell.evaluation.likelihood import CausalScorer
            from harness.cell.evaluation.lm_eval_task import LmEvalTask

            self._lm_task = make = self._lm_task or LmEvalTask(task.spec, test_rows, task.filter)
            self._scorer = CausalScorer(loaded.model, tokenizer, cell.evaluation.batch, limit, self._progress)
            encode, prompts, answers = self._scorer.encode_pair, Prompts(tokenizer, limit), task.answers

            def tokenise(chosen_rows: Sequence[rows.AnyRow]) -> list[Example]:
                if answers is not None:
                    return answered_examples(chosen_rows, prompts, make.pair, answers)
                return answer_examples(chosen_rows, make.prompt, make.answers, encode, limit)

            side, probe = "left", tokenise(test_rows[:_PROBED_CAUSAL])
            refuse_tokenless(probe, job.model.path)
        texts = _Tokenised(train_rows, tokenise)
        chosen = order(texts, wanted, batch, cell.seed) if wanted else []
        compared = order(texts, _COMPARED, batch, cell.seed) if job.imported and train_rows else []
        self.training_like = [collate(group, self.pad, side).to(device) for group in compared]
        """Training batches on which the loss of an imported adapter is computed. Empty for all other Cells."""
        for group in chosen:
            refuse_tokenless(group, job.model.path)
        ids = [[example.id for example in group] for group in chosen]
        self.order_sha256 = hashlib.sha256(json.dumps(ids, separators=(",", ":")).encode()).hexdigest()
        self.cut_examples = sum(example.cut for group in chosen for example in group) if task.answers else None
        self.batches = [collate(group, self.pad, side).to(device) for group in chosen]
        self.probe = collate(probe, self.pad, side).to(device)

    def logits(self, model: nn.Module) -> Tensor:
        """Return the model's logits on the probe texts. The logits are differentiable.

        For a causal model, only the logits of the last position are computed.
        """
        if any(self.probe.answers):
            return loop.last_logits(model, self.probe.inputs, 1)
        return model(**self.probe.inputs).logits  # type: ignore[no-any-return]

    def evaluate(self, model: nn.Module) -> Accuracy:
        """Score the test items and return the accuracy."""
        if self._lm_task is None:
            metric, scored_by = "accuracy", "harness"
            items = classification.score(model, self._test, self.pad, self._cell.evaluation.batch, self._progress)
            cut = sum(example.cut for example in self._test)
        else:
            metric, scored_by = self._lm_task.metric, self._lm_task.scored_by
            items = self._lm_task.score(self._scorer)
            cut = len(self._scorer.cut)
        right = sum(item.correct for item in items)
        low, high = wilson(right, len(items))
        return Accuracy(
            metric=metric, scored_by=scored_by, value=right / len(items), low=low, high=high,
            interval="Wilson 95 %", items=sorted(items, key=lambda item: item.id), cut_items=cut,
        )  # fmt: skip


def refuse_long(model: nn.Module, cell: Cell, answer: int = 0) -> None:
    """Raise UsageError if the texts of a Cell may have more tokens than its model has positions.

    answer: number of tokens that may be generated after a prompt; 0 if the task does not generate text.
    """
    # The model knows its positions; the config does not show that RoBERTa reserves two of them for padding.
    if problem := too_long(cell, positions(model), answer):
        raise UsageError(problem[0], hint=problem[1])


def refuse_tokenless(examples: Sequence[Example], folder: str, special: int = 0) -> None:
    """Raise UsageError if every text consists of special tokens only.

    folder: the model's folder, named in the message. special: number of special tokens that the tokenizer adds to a
    text.
    """
    if examples and all(len(example.tokens) <= special for example in examples):
        what = "the texts have no tokens: the tokenizer knows none of their characters"
        hint = "write the model's own tokenizer there with `tokenizer.save_pretrained(FOLDER)`"
        raise UsageError(what, where=folder, hint=hint)


def _split(job: Job, data: Asset) -> tuple[list[rows.AnyRow], list[rows.AnyRow]]:
    """Return the training rows, and the test rows that the Cell scores."""
    task, evaluation = job.task, job.cell.evaluation
    everything = rows.read(data.source, Path(data.path))
    training = rows.read(task.train.source, Path(task.train.path)) if task.train else None
    trained, tested = rows.split(everything, task.test, task.shuffle_seed, training)
    return trained, tested[evaluation.skip : evaluation.skip + evaluation.items]


def _builtin_task(job: Job, data: Asset) -> tuple[Any, list[Any], list[Any]]:
    """Return a task that lm-eval defines, its training rows, and the test rows that the Cell scores."""
    from harness.cell.evaluation.lm_eval_task import BuiltinLmEvalTask

    evaluation = job.cell.evaluation
    tested = range(evaluation.skip, evaluation.skip + evaluation.items)
    task = BuiltinLmEvalTask(Path(job.task.file), Path(data.path), tested, job.task.filter)
    return task, task.training() if job.cell.training.steps else [], task.tested()


class _Tokenised(Sequence[Example]):
    """The rows of a data set as a sequence of examples. Each row is tokenised when its example is first read."""

    def __init__(
        self, texts: Sequence[rows.AnyRow], tokenise: Callable[[Sequence[rows.AnyRow]], list[Example]]
    ) -> None:
        self._texts, self._tokenise = texts, tokenise
        self._known: dict[int, Example] = {}

    def __len__(self) -> int:
        return len(self._texts)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index not in self._known:
            (self._known[index],) = self._tokenise([self._texts[index]])
        return self._known[index]


class RandomData:
    """The data of the task `synthetic`: batches of random tokens. Nothing is scored.

    Every text has `max_tokens` tokens. The tokens depend on the seed, not on the Method. In a causal model, every token
    except the first has a loss. For an encoder, the labels are random too. The constructor raises UsageError if
    `max_tokens` is larger than the model's number of positions.
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

        self.probe = sequences(_PROBED_RANDOM, min(training.max_tokens, _PROBED_TOKENS), "probe")
        names = [f"random-{cell.seed}-{step}" for step in range(training.steps)]
        self.batches = [sequences(training.batch, training.max_tokens, name) for name in names]
        # The hash includes tokens and labels, because the names do not show the number and length of the sequences.
        drawn = hashlib.sha256(json.dumps([vocabulary, names]).encode())
        for batch in self.batches:
            drawn.update(json.dumps(batch.inputs["input_ids"].tolist()).encode())
            if self._encoder:
                drawn.update(json.dumps(batch.labels.tolist()).encode())
        self.order_sha256 = drawn.hexdigest()

    def logits(self, model: nn.Module) -> Tensor:
        """Return the model's logits on two random texts. The logits are differentiable.

        For a causal model, only the logits of the last position are computed.
        """
        if self._encoder:
            return model(**self.probe.inputs).logits  # type: ignore[no-any-return]
        return loop.last_logits(model, self.probe.inputs, 1)

    def evaluate(self, model: nn.Module) -> None:
        """Return None, because predictions of random tokens or labels have no meaning."""
