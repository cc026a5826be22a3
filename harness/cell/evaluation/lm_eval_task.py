"""A local YAML task as lm-eval runs it, fed from rows in memory; its prompt is also the training prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from harness.assets.rows import AnyRow, LabelledRow
from harness.cell.evaluation.likelihood import CausalScorer
from harness.errors import UsageError
from harness.records.record import Item
from harness.suites.task_schema import METRICS


class LmEvalTask:
    """A task. config: its YAML. test: the rows to score. judge: the filter that decides exact match."""

    def __init__(self, config: dict[str, Any], test: Sequence[AnyRow], judge: str = "none") -> None:
        import datasets

        data = datasets.DatasetDict({"test": datasets.Dataset.from_list([asdict(row) for row in test])})
        self._take({**config, "test_split": "test"}, data, judge)
        self.ids = [row.id for row in test]
        self._places = range(len(test))

    _places: range
    """Positions of the tested documents among all of the task's; one for each of `ids`."""

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
        """lm-eval and its version."""
        return f"lm-eval {version('lm-eval')}"

    @property
    def metric(self) -> str:
        """The name of the metric."""
        if self._chooses:
            return "accuracy"
        return "exact match" if self._judge == "none" else f"exact match ({self._judge})"

    def prompt(self, row: AnyRow) -> str:
        """Return the text before the answer, as lm-eval builds it, without the delimiter."""
        return str(self.task.doc_to_text(asdict(row)))

    def pair(self, row: AnyRow) -> tuple[str, str]:
        """Return prompt and answer of a task with text answers; the answer begins with the delimiter."""
        return self.prompt(row), f"{self.task.config.target_delimiter}{self.task.doc_to_target(asdict(row))}"

    def answers(self, row: LabelledRow) -> list[str]:
        """Return the choices as lm-eval scores them, each with the delimiter before it."""
        return self._choices(asdict(row))

    def _choices(self, doc: Any) -> list[str]:
        return [f"{self.task.config.target_delimiter}{choice}" for choice in self.task.doc_to_choice(doc)]

    def score(self, scorer: CausalScorer) -> list[Item]:
        """Run lm-eval; return one 0/1 Item per test row."""
        from lm_eval.evaluator import evaluate

        # Not `limit`, which always begins with the first. A range: lm-eval tests every document for membership.
        samples: Any = {self.name: self._places}
        outcome = evaluate(
            lm=scorer, task_dict={self.name: self.task}, samples=samples, bootstrap_iters=0, log_samples=True
        )
        key = METRICS[self.task.OUTPUT_TYPE]
        # Each sample occurs once for each filter.
        scored = [s for s in outcome["samples"][self.name] if s["filter"] == self._judge]
        if len(scored) != len(self.ids):
            raise UsageError(f"lm-eval scored {len(scored)} of {len(self.ids)} items by the filter `{self._judge}`")
        scored.sort(key=lambda sample: sample["doc_id"])
        return [Item(id=self.ids[self._places.index(s["doc_id"])], correct=int(s[key])) for s in scored]
