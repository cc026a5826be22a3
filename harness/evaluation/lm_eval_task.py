"""A local YAML task as lm-eval runs it, fed from rows in memory; its prompt is also the training prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from harness.assets.rows import Row
from harness.evaluation.likelihood import CausalScorer
from harness.records import Item

METRIC = "acc"


class LmEvalTask:
    """config: the YAML task as a dict. test: the rows that are scored."""

    def __init__(self, config: dict[str, Any], test: Sequence[Row]) -> None:
        import datasets
        from lm_eval.api.task import ConfigurableTask

        data = datasets.DatasetDict({"test": datasets.Dataset.from_list([asdict(row) for row in test])})

        def in_memory(**_: Any) -> Any:
            return data

        self.task = ConfigurableTask(config={**config, "custom_dataset": in_memory, "test_split": "test"})
        self.name = str(config["task"])
        self.ids = [row.id for row in test]

    @property
    def scored_by(self) -> str:
        """Name the judge and its version."""
        return f"lm-eval {version('lm-eval')}"

    def prompt(self, row: Row) -> str:
        """Return the text before the answer, as lm-eval builds it, without the delimiter."""
        return str(self.task.doc_to_text(asdict(row)))

    def answers(self, row: Row) -> list[str]:
        """Return the choices as lm-eval scores them, each after the delimiter."""
        return [f"{self.task.config.target_delimiter}{choice}" for choice in self.task.doc_to_choice(asdict(row))]

    def score(self, scorer: CausalScorer) -> list[Item]:
        """Run lm-eval; return one 0/1 Item per test row."""
        from lm_eval.evaluator import evaluate

        outcome = evaluate(lm=scorer, task_dict={self.name: self.task}, bootstrap_iters=0, log_samples=True)
        samples = sorted(outcome["samples"][self.name], key=lambda sample: sample["doc_id"])
        return [Item(id=self.ids[s["doc_id"]], correct=int(s[METRIC])) for s in samples]
