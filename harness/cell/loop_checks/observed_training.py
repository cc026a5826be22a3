"""Train a tiny model by any loop, and observe what the loop gives to the model and to the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from harness.cell.training import loop, optimizers
from harness.cell.training.batches import Batch, Example, collate
from harness.cell.training.loop import StepSamples
from harness.cell.training.unsaved_optimizer import UnsavedOptimizer
from harness.conformance.comparison.moved_numbers import perturbed
from harness.conformance.subject import DTYPES, configure, load, warm
from harness.methods import checksums
from harness.methods.registry import Registry
from harness.methods.spec import Adapted
from harness.records.record import Training

Rows = list[tuple[int, ...]]
"""Texts as token ids, without padding."""
VOCABULARY, STEPS, BATCH = 64, 6, 4
RECIPE = Training(steps=STEPS, batch=BATCH, lr=5e-3, warmup=2, weight_decay=0.01)
_TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 8.0, "targets": _TARGETS},
    "dora": {"rank": 4, "alpha": 8.0, "targets": _TARGETS},
    "adalora": {
        "rank": 4, "alpha": 8.0, "targets": _TARGETS, "target_rank": 2, "tinit": 1, "tfinal": 2, "total_steps": STEPS,
        "delta_t": 1,
    },
}  # fmt: skip
"""Method -> its config in the checks of loops."""


@dataclass(frozen=True)
class Trainee:
    """The training that a loop runs in a check: Method, implementation, dtype and recipe."""

    method: str
    implementation: str
    dtype: str
    registry: Registry
    recipe: Training = RECIPE

    def of_reference(self, dtype: str) -> Trainee:
        """Return a copy of this trainee with the implementation `reference` and with `dtype`."""
        return Trainee(self.method, "reference", dtype, self.registry, self.recipe)


@dataclass
class Observed:
    """Observations of one training run: each step, and the tensors at its end."""

    samples: StepSamples
    rows: list[Rows] = field(default_factory=list)
    """Texts that went through the model in each step, in order."""
    rates: list[list[float]] = field(default_factory=list)
    """Learning rate of each parameter group in each step."""
    weights: list[dict[str, Tensor]] = field(default_factory=list)
    """Trained tensors before each optimizer step."""
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    """Gradients of the trained tensors in each optimizer step."""
    end: dict[str, Tensor] = field(default_factory=dict)
    """Trained tensors after the last step."""
    method_steps: list[int] = field(default_factory=list)
    """Step numbers with which the loop called the Method's `after_step`, in order."""
    changed: list[str] = field(default_factory=list)
    """Names of frozen tensors that changed."""
    in_evaluation: int = 0
    """Number of forward passes in evaluation mode."""


def base(dtype: str) -> Any:
    """Return a Llama of two layers. Its random weights are equal at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.18, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )  # fmt: skip
        return LlamaForCausalLM(config).to(DTYPES[dtype])


def batches(recipe: Training) -> list[Batch]:
    """Return batches of texts of 6 to 20 tokens.

    Each answer is the last 1 to 5 tokens of its text. The lengths of the answers differ, so a loop that averages the
    loss per text, instead of per token of an answer, gives a different loss.
    """
    generator = torch.Generator().manual_seed(1)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    def text(name: str) -> Example:
        tokens = torch.randint(3, VOCABULARY, (number(6, 20),), generator=generator).tolist()
        return Example(name, tuple(tokens), 0, number(1, 5))

    texts = [[text(f"{step}-{row}") for row in range(recipe.batch)] for step in range(recipe.steps)]
    return [collate(group, 0, "left") for group in texts]


def attached(trainee: Trainee, moved_by: int | None = None) -> Adapted:
    """Return the adapted model of a trainee before training. None of the adapter's factors is zero.

    moved_by: seed of a random perturbation, which moves each number by up to half a unit in the last place. None: no
    perturbation.
    """
    start, state = _start(trainee)
    if moved_by is not None:
        generator = torch.Generator().manual_seed(moved_by)
        start = {name: perturbed(t, trainee.dtype, generator) for name, t in start.items()}
    adapted = _attach(trainee)
    load(adapted, start, state)
    return adapted


def _start(trainee: Trainee) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    truth = _attach(trainee.of_reference("float64"))
    values = {name: t.detach() for name, t in truth.tensors().items()}
    warm(values, torch.Generator().manual_seed(3))
    return {name: t / 2 for name, t in values.items()}, {n: t.detach() for n, t in truth.state().items()}


def _attach(trainee: Trainee) -> Adapted:
    model = base(trainee.dtype).requires_grad_(False)
    attach = trainee.registry.find("method", trainee.method, trainee.implementation)
    adapted: Adapted = attach(
        model, configure(trainee.method, CONFIGS[trainee.method]), torch.Generator().manual_seed(2)
    )
    return adapted


def observe(train: Callable[..., StepSamples], trainee: Trainee, moved_by: int | None = None) -> Observed:
    """Train `trainee` by the function `train`, and return the observations.

    train: a function with the arguments and the result of `loop.train`. moved_by: seed of a random
    perturbation of the initial tensors, or None.
    """
    adapted = attached(trainee, moved_by)
    seen = Observed(StepSamples())
    optimizer, schedule = optimizers.make(adapted, [], trainee.recipe, implementation=trainee.implementation)
    frozen = {name: p for name, p in adapted.model.named_parameters() if not p.requires_grad}
    before, after_step = checksums.crc32_by_name(frozen), adapted.after_step
    passed: Rows = []

    def see_pass(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        ids = keywords["input_ids"]
        mask = keywords.get("attention_mask", torch.ones_like(ids)).bool()  # packed texts have no mask
        passed.extend(tuple(row[real].tolist()) for row, real in zip(ids, mask, strict=True))
        seen.in_evaluation += not module.training

    def see_step() -> None:
        seen.rows.append(list(passed))
        passed.clear()
        seen.rates.append([float(group["lr"]) for group in optimizer.param_groups])
        seen.weights.append(_copies(adapted.tensors()))
        named = {n: t.grad for n, t in adapted.tensors().items() if t.grad is not None}
        seen.gradients.append(_copies(named))

    def see_method_step(step: int) -> None:
        seen.method_steps.append(step)
        after_step(step)

    adapted.after_step = see_method_step  # type: ignore[method-assign]
    handle = adapted.model.register_forward_pre_hook(see_pass, with_kwargs=True)
    watched = _WatchedOptimizer(optimizer, see_step)
    seen.samples = train(
        adapted, [], batches(trainee.recipe), watched, schedule, 0, lambda *_: None, trainee.recipe.accumulate
    )
    handle.remove()
    seen.end = _copies(adapted.tensors())
    after = checksums.crc32_by_name(frozen)
    seen.changed = [name for name in before if before[name] != after[name]]
    return seen


class _WatchedOptimizer(UnsavedOptimizer):
    """An optimizer that calls a function before each step."""

    def __init__(self, inner: torch.optim.Optimizer, before: Callable[[], None]) -> None:
        super().__init__(inner)
        self._before = before

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Call the function, and then take a step of the inner optimizer. `closure` is not used."""
        self._before()
        super().step()


def gradients_at(
    trainee: Trainee, weights: Sequence[dict[str, Tensor]], dtype: str, seed: int | None
) -> dict[str, Tensor]:
    """Return the gradients of the reference in `dtype`, one backward pass per batch, each at the given weights.

    The result maps `step N NAME` to a gradient, where NAME is the name of a trained tensor. weights: the trained
    tensors before each step. seed: seed of a random perturbation of the weights, or None.
    """
    adapted, found = _attach(trainee.of_reference(dtype)), dict[str, Tensor]()
    load(adapted, {}, _start(trainee)[1])
    adapted.model.train()
    nothing = torch.optim.SGD(adapted.parameters(), lr=0.0)
    for step, (values, batch) in enumerate(zip(weights, batches(trainee.recipe), strict=True)):
        if seed is not None:
            generator = torch.Generator().manual_seed(1000 * seed + step)
            values = {name: perturbed(t, trainee.dtype, generator) for name, t in values.items()}
        load(adapted, values)
        loop.backward(adapted, [batch], nothing)
        found |= {f"step {step + 1} {n}": _copy(t.grad) for n, t in adapted.tensors().items() if t.grad is not None}
    return found


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: _copy(tensor) for name, tensor in tensors.items()}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()
