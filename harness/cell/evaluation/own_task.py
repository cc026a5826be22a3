"""One of lm-eval's own tasks, as lm-eval runs it, fed from the splits that were fetched for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.assets.rows import AnsweredRow, LabelledRow, without_overlap
from harness.cell.evaluation.lm_eval_task import LmEvalTask
from harness.errors import UsageError

OwnRow = LabelledRow | AnsweredRow
_SHOTS_SEED = 1234
"""lm-eval's own default; it selects the few-shot examples."""


class OwnTask(LmEvalTask):
    """A task of lm-eval. file: its YAML. folder: its splits. tested: positions of the test items to score. judge: the
    filter that decides.

    Training prompts are the task's own, without the examples (few-shot) and the description that a test prompt may have.
    """

    def __init__(self, file: Path, folder: Path, tested: range, judge: str) -> None:
        import datasets
        from lm_eval.tasks._yaml_loader import (
            load_yaml,
        )  # its public functions read all of lm-eval's tasks first, which takes seconds
        from pyarrow.parquet import read_table

        config = load_yaml(file)
        data = datasets.DatasetDict({p.stem: datasets.Dataset(read_table(p)) for p in sorted(folder.glob("*.parquet"))})
        self._take(config, data, judge)
        self.task.set_fewshot_seed(_SHOTS_SEED)
        every = list(self.task.eval_docs)
        if not tested or tested.stop > len(every):
            # The file may have enough rows, and the task's `process_docs` may drop some.
            what = f"items {tested.start + 1} to {tested.stop} are selected, and {self.name} tests {len(every)}"
            hint = f"`evaluation.items`, and those of `tune` after them, may be at most {len(every)} together"
            raise UsageError(what, where=str(file), hint=hint)
        docs, self._places = every[tested.start : tested.stop], tested
        self.ids = [f"{self._split}-{number}" for number in tested]
        self._docs: dict[str, Any] = dict(zip(self.ids, docs, strict=True))

    def tested(self) -> list[OwnRow]:
        """Return the test items as rows, with the prompts that training would give them."""
        return [self._row(name, self._docs[name]) for name in self.ids]

    def training(self) -> list[OwnRow]:
        """Return the training split as rows, without those that are also test items."""
        docs = {f"train-{number}": doc for number, doc in enumerate(self.task.training_docs() or [])}
        self._docs |= docs
        return without_overlap([self._row(name, doc) for name, doc in docs.items()], self.tested())

    def prompt(self, row: Any) -> str:
        """Return the text before the answer."""
        return str(row.overlap_key)

    def answers(self, row: Any) -> list[str]:
        """Return the choices as lm-eval scores them, each after the delimiter."""
        return self._choices(self._docs[row.id])

    def pair(self, row: Any) -> tuple[str, str]:
        """Return prompt and answer; the answer begins with the delimiter."""
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
