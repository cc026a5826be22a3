"""The keys of a suite's YAML, with their types and plausible ranges. `loader` checks what their values mean."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from harness.assets.table import Source
from harness.records.record import Dtype, FrozenModel, Loop, Optimizer, Quantization

_T = TypeVar("_T")
OneOrMany = Annotated[list[_T], BeforeValidator(lambda v: v if isinstance(v, list) else [v]), Field(min_length=1)]
"""Type of a key that is an axis: a list of values. A single value stands for a list of one."""
Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
Word = Annotated[str, Field(min_length=1)]
Rate = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=0, le=10_000_000)]
Positive = Annotated[int, Field(ge=1, le=1_000_000)]


SYNTHETIC = "synthetic"
"""Name of the task with random tokens instead of texts (see `harness.suites.synthetic_task`)."""


class Keys(BaseModel):
    """Base class for the keys of a YAML file. Values are strictly typed, and unknown keys are refused."""

    model_config = FrozenModel.model_config


class BaseKeys(Keys):
    """Values of the key `base:` of an entry."""

    quantization: Quantization = "none"
    implementation: str = ""


class TrainingKeys(Keys):
    """Values of the key `training:` of an entry. They become fields of `records.training.Training`."""

    steps: Count | None = None
    batch: OneOrMany[Positive] | None = None
    lr: OneOrMany[Rate] | None = None
    head_lr: Rate | None = None
    warmup: Count | None = None
    weight_decay: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: OneOrMany[Annotated[int, Field(ge=4, le=1_000_000)]] | None = None
    """Number of tokens to which texts are truncated. At least 4: two special tokens of an encoder and two of text."""
    accumulate: OneOrMany[Positive] | None = None
    checkpointing: OneOrMany[bool] | None = None
    lr_ratio: OneOrMany[Annotated[float, Field(gt=0, le=10_000)]] | None = None
    compile: OneOrMany[bool] | None = None
    layerwise: OneOrMany[bool] | None = None
    loop: OneOrMany[Loop] | None = None


class EvaluationKeys(Keys):
    """Values of the key `evaluation:` of an entry. They become fields of `records.record.Evaluation`."""

    items: Positive | None = None
    batch: Positive | None = None


class PromptKeys(Keys):
    """Values of the key `prompts:` of an entry, for latencies. They become fields of `records.record.Evaluation`."""

    batch: Positive | None = Field(default=None, serialization_alias="prompt_batch")
    tokens: Positive | None = Field(default=None, serialization_alias="prompt_tokens")
    passes: Annotated[int, Field(ge=6, le=1_000_000)] | None = None
    """Smallest number of timed passes. At least 6, because fewer passes give no 95 % interval."""


class TuneKeys(Keys):
    """Values of the key `tune:` of an entry, which declares a search for the learning rate."""

    lr: OneOrMany[Rate] = []
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 100
    items: Positive | None = None
    config: dict[str, Any] = {}


Timed = Literal["every-seed", "first-seed", "never"]
"""Seeds for which an entry's latencies are measured. Cells of a search (`tune:`) never have latencies."""


class CellKeys(Keys):
    """The keys of one entry. A list of values is an axis, and every combination of values is a Cell.

    No key is required here, because the block of the entry may have it. `missing` finds keys that both lack.
    """

    id: Id | None = None
    model: OneOrMany[Word] = []
    task: OneOrMany[Word] = []
    method: OneOrMany[Word] = []
    implementation: OneOrMany[Word] = ["reference"]
    environment: OneOrMany[str] = [""]
    serve: OneOrMany[str] = [""]
    config: dict[str, Any] = {}
    base: OneOrMany[BaseKeys] = [BaseKeys()]
    optimizer: OneOrMany[Optimizer] = ["adamw"]
    dtype: OneOrMany[Dtype] = ["float32"]
    seed: OneOrMany[Annotated[int, Field(ge=0, lt=2**32)]] = [0]
    training: TrainingKeys = TrainingKeys()
    evaluation: EvaluationKeys = EvaluationKeys()
    latency: Timed = "every-seed"
    prompts: PromptKeys = PromptKeys()
    tune: TuneKeys | None = None

    def missing(self) -> list[str]:
        """List the required keys that are missing in both the entry and its block."""
        needed = {"model": self.model, "task": self.task, "method": self.method}
        missing = [key for key, values in needed.items() if not values]
        if self.training.steps is None:
            missing.append("training.steps")
        if self.evaluation.items is None and not self.is_synthetic:
            missing.append("evaluation.items")
        return missing

    @property
    def is_synthetic(self) -> bool:
        """True if the task is `synthetic`, which scores no items."""
        return SYNTHETIC in self.task

    def evaluation_fields(self) -> dict[str, Any]:
        """Return the fields of `records.record.Evaluation` that the entry sets."""
        prompts = self.prompts.model_dump(exclude_none=True, by_alias=True)
        return self.evaluation.model_dump(exclude_none=True) | prompts


class BlockKeys(CellKeys):
    """One block of `matrix:`. The entries in `cells` share its other keys. Without `cells`, the block is an entry."""

    cells: list[CellKeys] | None = Field(default=None, min_length=1)


class ComparisonKeys(Keys):
    """One entry of `comparisons:`."""

    better: OneOrMany[Id] = []
    than: OneOrMany[Id] = []
    same_losses: OneOrMany[Id] = Field(default=[], alias="same-losses")
    as_: OneOrMany[Id] = Field(default=[], alias="as")
    says: Word = ""

    @model_validator(mode="after")
    def _is_one_comparison(self) -> ComparisonKeys:
        given = [bool(side) for side in (self.better, self.than, self.same_losses, self.as_)]
        if given not in ([True, True, False, False], [False, False, True, True]) or not self.says:
            forms = "{better: ID, than: ID, says: SENTENCE} or {same-losses: ID, as: ID, says: SENTENCE}"
            raise ValueError(f"not a comparison; write {forms}")
        return self

    @property
    def kind(self) -> Literal["better", "same-losses"]:
        """Kind of comparison: of accuracies (`better`) or of losses (`same-losses`)."""
        return "better" if self.better else "same-losses"

    @property
    def left(self) -> list[str]:
        """Ids of the entries under `better:` or `same-losses:`."""
        return self.better or self.same_losses

    @property
    def right(self) -> list[str]:
        """Ids of the entries under `than:` or `as:`."""
        return self.than or self.as_


class SuiteKeys(Keys):
    """The keys at the top level of a suite."""

    suite: Id
    title: str = ""
    about: str = ""
    sources: list[Source] = []
    matrix: list[BlockKeys] = Field(min_length=1)
    comparisons: list[ComparisonKeys] = []
