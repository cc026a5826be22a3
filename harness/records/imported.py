"""Facts about an adapter that another program trained, for the Record of the Cell that evaluates it. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from harness.records.base_model import Count, FrozenModel, Json


class LoggedLoss(FrozenModel):
    """One entry of a training log. The loss is a mean over all steps since the previous entry."""

    step: Count
    """Number of optimizer steps so far."""
    loss: float
    """Logged training loss, in nats."""


class LossAgreement(FrozenModel):
    """Comparison of the loss of the loaded adapter with the last logged losses.

    The rule: the loss must lie in the range of the logged losses of the second half of the log, widened by `margin` on
    both sides. The last entry alone would be too noisy, because it may be a mean over few texts.
    """

    evaluated: float | None = None
    """Mean loss of the loaded adapter on training texts of the task, in nats. None if it was not computed."""
    margin: float | None = None
    """Three times the standard deviation of this loss over the batches of training texts, in nats."""
    lowest: float | None = None
    """Lowest logged loss of the second half of the log."""
    highest: float | None = None
    """Highest logged loss of the second half of the log."""
    because: str = ""
    """Reason why nothing was compared. Empty if the losses were compared."""

    @property
    def contradiction(self) -> str:
        """A warning if the losses do not agree, without a full stop. Empty if they agree or were not compared."""
        if self.evaluated is None or self.margin is None or self.lowest is None or self.highest is None:
            return ""
        if self.lowest - self.margin <= self.evaluated <= self.highest + self.margin:
            return ""
        return (
            f"the loss of this adapter on training texts of the task is {self.evaluated:.4g}, but the last logged losses "
            f"are {self.lowest:.4g} to {self.highest:.4g} (allowed: {self.margin:.2g} more or less); the file is not what "
            "the log describes, or its training had other texts, another prompt or another loss mask"
        )


class Imported(FrozenModel):
    """Origin of an adapter that another program trained."""

    folder: str
    """Path of the imported folder, as the user wrote it."""
    checkpoint: Count | None = None
    """Number of the checkpoint that was read. None if the adapter stands in the folder itself."""
    tool: str = ""
    """Program that wrote the folder. Empty if its files do not show that."""
    tool_file: str = ""
    """File in the folder that shows which program wrote it."""
    adapter_sha256: str
    """SHA-256 of adapter_model.safetensors."""
    config_sha256: str
    """SHA-256 of adapter_config.json."""
    base_named: str = ""
    """Value of `base_model_name_or_path` in adapter_config.json. It may be a path of another machine."""
    settings: dict[str, Json] = Field(default={})
    """Settings of the training, by name, as text files in the folder state them."""
    logged: list[LoggedLoss] = Field(default=[])
    """Training losses by step, as the program logged them."""
    absent: list[str] = Field(default=[])
    """Files that an adapter's folder usually has, but this folder lacks."""
    unknown: dict[str, str] = Field(default={})
    """Facts that the folder does not state: name of the fact -> reason."""
    loss: LossAgreement | None = None
    """Comparison of the loss with the log. None if the Cell ended before the comparison."""

    @property
    def origin(self) -> str:
        """The origin of the adapter, as a part of a sentence."""
        checkpoint = "" if self.checkpoint is None else f", checkpoint {self.checkpoint}"
        tool = f"written by {self.tool} ({self.tool_file})" if self.tool else "written by an unknown program"
        return f"imported from {self.folder}{checkpoint}, {tool}"

    @property
    def loss_contradiction(self) -> str:
        """The warning if the loss does not agree with the log. Empty if it agrees or was not compared."""
        return self.loss.contradiction if self.loss else ""

    @property
    def loss_sentence(self) -> str:
        """The result of the comparison of the loss with the log, in one sentence without a full stop."""
        if self.loss is None or self.loss.evaluated is None:
            return f"Its loss was not compared with its log: {self.loss.because if self.loss else 'the Cell failed'}"
        if self.loss.contradiction:
            return f"Warning: {self.loss.contradiction}"
        return f"Its loss, {self.loss.evaluated:.4g}, agrees with its log"

    @property
    def not_known(self) -> str:
        """The unknown facts with their reasons, as a part of a sentence. Empty if there are none."""
        return "; ".join(f"{name} ({reason})" for name, reason in self.unknown.items())
