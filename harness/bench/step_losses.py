"""Check the losses of timed training steps against the reference, which takes the same steps after the timing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.bench.adapted_llama import SEED, AdaptedLlama, LlamaTraining
from harness.bench.results import TIMED_CALL
from harness.conformance.case import Case
from harness.conformance.comparison import whole_model
from harness.conformance.comparison.check_results import judged, skipped
from harness.conformance.comparison.moved_numbers import perturbed
from harness.conformance.comparison.tolerance_policies import carried_noise
from harness.conformance.subject import DTYPES, attach_reference, load
from harness.conformance.tolerance_constants import PERTURBED_DRAWS, TRAJECTORY_FACTOR
from harness.methods import module_copy
from harness.records.check import CheckResult

TRAINED = Case("trained", seed=SEED)


class LossCheck:
    """The start of a training run, from which the reference can train again."""

    def __init__(self, trainee: AdaptedLlama, former: LossCheck | None = None) -> None:
        """Copy the start. Call this before `trainee.start_training`.

        former: the check of the other implementation. If both start alike, the reference trains only once for both.
        """
        subject = trainee.subject
        self.method, self.config, self.dtype = subject.method, subject.config, subject.dtype
        self.shape, self.device = trainee.shape, trainee.device
        self.is_random = bool(getattr(subject.config, "dropout", 0.0))
        """True if the losses depend on random masks. Then nothing is copied, and the check is skipped."""
        if not self.is_random:
            self.base = whole_model.base(subject, "float64")
            """The base model in float64."""
            self.tensors = {name: t.detach().clone() for name, t in subject.adapted.tensors().items()}
            """Copies of the adapter's trainable tensors at the start."""
            self.state = {name: t.detach().clone() for name, t in subject.state().items()}
            """Copies of the adapter's other state at the start."""
            self._known: dict[tuple[int, str, int | None], dict[str, Tensor]] = {}
            if former is not None and self._starts_like(former):
                self.base, self._known = former.base, former._known

    def _starts_like(self, other: LossCheck) -> bool:
        pairs = [
            (self.tensors, other.tensors),
            (self.state, other.state),
            (self.base.state_dict(), other.base.state_dict()),
        ]
        return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)

    def result(self, losses: Sequence[float]) -> CheckResult:
        """Compare the losses of all steps with the reference's, which trains in float64 and in the own dtype.

        The loss is a float32 number in every narrow dtype, so its rounding errors are those of float32.
        """
        if self.is_random:
            return skipped(self, TRAINED, TIMED_CALL, "the losses depend on random dropout masks")
        count = len(losses)
        mine = {"losses": torch.tensor(losses, dtype=torch.float64)}
        draws = (self._of_reference(count, self.dtype, seed) for seed in (None, *range(PERTURBED_DRAWS)))
        judgement = carried_noise(mine, self._of_reference(count, "float64"), draws, "float32", TRAJECTORY_FACTOR)
        return judged(self, TRAINED, TIMED_CALL, judgement, f"losses of {count} steps")

    def _of_reference(self, count: int, dtype: str, seed: int | None = None) -> dict[str, Tensor]:
        """Train the reference for `count` steps, and return its losses. Later calls return the same result.

        seed: if given, every adapter tensor is moved at random by up to half a unit in the last place at the start.
        """
        key = (count, dtype, seed)
        if key not in self._known:
            self._known[key] = self._train(count, dtype, seed)
        return self._known[key]

    def _train(self, count: int, dtype: str, seed: int | None) -> dict[str, Tensor]:
        model = module_copy.copied(self.base).to(DTYPES[dtype])
        adapted = attach_reference(self.method, model, self.config, None, torch.Generator().manual_seed(0))
        start = self.tensors
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            start = {name: perturbed(t.double(), dtype, generator).to(t.dtype) for name, t in start.items()}
        load(adapted, start, self.state)
        training = LlamaTraining(model, adapted, self.shape, self.device)
        training.start_training()
        for _ in range(count):
            training.step()
        return {"losses": torch.tensor(training.losses, dtype=torch.float64)}
