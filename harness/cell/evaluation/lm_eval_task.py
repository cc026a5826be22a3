"""Tasks that lm-eval scores: local tasks, and tasks that lm-eval itself defines.

The rows of a local task are in memory. The splits of a task that lm-eval defines were fetched to a folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness.assets.rows import AnsweredRow, AnyRow, LabelledRow, without_overlap
from harness.cell.evaluation.likelihood import CausalScorer
from harness.errors import UsageError
from harness.records.record import Item
from harness.suites.lm_eval_keys import METRICS


class LmEvalTask:
    """A task from a local file, scored by lm-eval.

    config: the task's config for lm-eval. test: the rows to score. judge: name of the lm-eval filter whose output must
    equal the right answer.
    """

    def __init__(self, config: dict[str, Any], test: Sequence[AnyRow], judge: str = "none") -> None:
        import datasets

        data = datasets.DatasetDict({"test": datasets.Dataset.from_list([asdict(row) for row in test])})
        self._take({**config, "test_split": "test"}, data, judge)
        self.ids = [row.id for row in test]
        self._places = range(len(test))

    _places: range
    """Positions of the scored items among the documents of the lm-eval task, in the order of `ids`."""

    def _take(self, config: dict[str, Any], data: Any, judge: str) -> None:
        from lm_eval.api.task import ConfigurableTask

        def in_memory(**_: Any) -> Any:
            return data

        self.task = ConfigurableTask(config={**config, "custom_dataset": in_memory})
        self.name = str(config["task"])
        self._judge = judge
        self._chooses = self.task.OUTPUT_TYPE == "multiple_choice"

    @property
    def scored_by(self) -> str:
        """The program that scores, as the text `lm-eval VERSION`."""
        return f"lm-eval {version('lm-eval')}"

    @property
    def metric(self) -> str:
        """The name of the metric, e.g. `accuracy`."""
        if self._chooses:
            return "accuracy"
        return "exact match" if self._judge == "none" else f"exact match ({self._judge})"

    def prompt(self, row: AnyRow) -> str:
        """Return the prompt of a row as lm-eval builds it. It does not include the `target_delimiter` before the answer."""
        return str(self.task.doc_to_text(asdict(row)))

    def pair(self, row: AnyRow) -> tuple[str, str]:
        """Return the prompt and the answer of a row. The answer begins with lm-eval's `target_delimiter`.

        The answers of the task must be texts.
        """
        return self.prompt(row), f"{self.task.config.target_delimiter}{self.task.doc_to_target(asdict(row))}"

    def answers(self, row: LabelledRow) -> list[str]:
        """Return the choices that lm-eval scores for a row. Each choice begins with lm-eval's `target_delimiter`."""
        return self._choices(asdict(row))

    def _choices(self, doc: Any) -> list[str]:
        return [f"{self.task.config.target_delimiter}{choice}" for choice in self.task.doc_to_choice(doc)]

    def score(self, scorer: CausalScorer) -> list[Item]:
        """Run lm-eval and return one Item (id, and whether the answer is right) per test row."""
        from lm_eval.evaluator import evaluate

        # `limit` would start at the first document. A range is fast, because lm-eval tests each document for membership.
        samples: Any = {self.name: self._places}
        outcome = evaluate(
            lm=scorer, task_dict={self.name: self.task}, samples=samples, bootstrap_iters=0, log_samples=True
        )
        key = METRICS[self.task.OUTPUT_TYPE]
        # Each sample occurs once per filter.
        scored = [s for s in outcome["samples"][self.name] if s["filter"] == self._judge]
        if len(scored) != len(self.ids):
            what = f"lm-eval scored {len(scored)} of {len(self.ids)} items by the filter `{self._judge}`"
            raise UsageError(what, hint="name another filter of the task, or another task")
        scored.sort(key=lambda sample: sample["doc_id"])
        return [Item(id=self.ids[self._places.index(s["doc_id"])], correct=int(s[key])) for s in scored]


OwnRow = LabelledRow | AnsweredRow
_SHOTS_SEED = 1234
"""Seed that selects the few-shot examples; lm-eval has the same default."""


class BuiltinLmEvalTask(LmEvalTask):
    """A task that lm-eval defines.

    A test prompt may contain few-shot examples and a description. A training prompt contains neither. file: the task's
    YAML file. folder: the folder with the task's splits. tested: positions of the test items to score. judge: name of
    the lm-eval filter whose output must equal the right answer.
    """

    def __init__(self, file: Path, folder: Path, tested: range, judge: str) -> None:
        import datasets

        # lm-eval's public functions would first read all its tasks, which takes seconds.
        from lm_eval.tasks._yaml_loader import load_yaml
        from pyarrow.parquet import read_table

        config = load_yaml(file)
        data = datasets.DatasetDict({p.stem: datasets.Dataset(read_table(p)) for p in sorted(folder.glob("*.parquet"))})
        self._take(config, data, judge)
        self.task.set_fewshot_seed(_SHOTS_SEED)
        every = list(self.task.eval_docs)
        if not tested or tested.stop > len(every):
            # The task's `process_docs` may have dropped some rows of the file.
            what = f"items {tested.start + 1} to {tested.stop} are selected, and {self.name} tests {len(every)}"
            hint = f"`evaluation.items`, and those of `tune` after them, may be at most {len(every)} together"
            raise UsageError(what, where=str(file), hint=hint)
        docs, self._places = every[tested.start : tested.stop], tested
        self.ids = [f"{self._split}-{number}" for number in tested]
        self._docs: dict[str, Any] = dict(zip(self.ids, docs, strict=True))

    def tested(self) -> list[OwnRow]:
        """Return the test items as rows. Their prompts have no few-shot examples and no description."""
        return [self._row(name, self._docs[name]) for name in self.ids]

    def training(self) -> list[OwnRow]:
        """Return the rows of the training split whose prompts are not those of test items."""
        docs = {f"train-{number}": doc for number, doc in enumerate(self.task.training_docs() or [])}
        self._docs |= docs
        return without_overlap([self._row(name, doc) for name, doc in docs.items()], self.tested())

    def prompt(self, row: Any) -> str:
        """Return the prompt of a row."""
        return str(row.overlap_key)

    def answers(self, row: Any) -> list[str]:
        """Return the choices that lm-eval scores for a row. Each choice begins with lm-eval's `target_delimiter`."""
        return self._choices(self._docs[row.id])

    def pair(self, row: Any) -> tuple[str, str]:
        """Return the prompt and the answer of a row. The answer begins with lm-eval's `target_delimiter`."""
        return row.prompt, f"{self.task.config.target_delimiter}{row.answer}"

    @property
    def _split(self) -> str:
        return str(self.task.config.test_split or self.task.config.validation_split)

    def _row(self, name: str, doc: Any) -> OwnRow:
        text, target = self.task.doc_to_text(doc), self.task.doc_to_target(doc)
        if not isinstance(text, str):
            raise UsageError(f"{self.name} has several prompts and one answer", hint="name a task of one prompt")
        if not self._chooses:
            return AnsweredRow(name, text, str(target[0] if isinstance(target, list) else target))
        choices = self.task.doc_to_choice(doc)
        label = target[0] if isinstance(target, list) else target
        return LabelledRow(name, text, label if isinstance(label, int) else choices.index(label))
