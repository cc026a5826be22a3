"""Training steps as in a user's program: a small Llama with a Method such as LoRA, and an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from harness.bench.steps import STEPS, Backbone, StepBenchmark
from harness.cell import base_quantisation
from harness.cell.training.optimizers import BETAS, EPS
from harness.conformance import parity_suite
from harness.conformance.case import Case
from harness.conformance.cell_gate import parity_gate
from harness.conformance.comparison import whole_model
from harness.conformance.comparison.check_results import judged
from harness.conformance.comparison.observations import inference
from harness.conformance.comparison.tolerance_policies import carried_noise
from harness.conformance.subject import (
    DTYPES,
    Original,
    Subject,
    adaptable_layers,
    configure,
    initial_tensors,
    load,
    load_start,
    warm,
)
from harness.methods.registry import Implementation, Registry
from harness.methods.spec import Adapted
from harness.records.record import Base, CheckResult

SEED = 20
LR, WEIGHT_DECAY = 1e-4, 0.0
GATED_TOKENS = 16
"""Number of tokens in the text on which the parity gate compares the model with the reference.

Loss and gradients are compared on a whole batch instead.
"""


def llama(shape: Backbone, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a Llama with random weights, which are the same in every call. shape: sizes of the model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.width, num_hidden_layers=shape.layers, intermediate_size=shape.mlp,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=shape.vocabulary,
        max_position_embeddings=max(shape.tokens, GATED_TOKENS), use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config)
    return model.to(device, dtype)


def batch(shape: Backbone, step: int, device: torch.device) -> Tensor:
    """Return the int64 token ids of a step, shape (batch, tokens). All implementations get the same ids."""
    generator = torch.Generator().manual_seed(SEED + step)
    return torch.randint(0, shape.vocabulary, (shape.batch, shape.tokens), generator=generator).to(device)


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """Return the mean cross-entropy of next-token prediction, as a scalar tensor.

    ids: int64 token ids, (batch, tokens). The scalar is float64 if the logits are float64, otherwise float32.
    """
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, :-1]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.cross_entropy(wide.flatten(0, 1), ids[:, 1:].flatten())


@dataclass(frozen=True)
class StepSetting:
    """A training step to time, with its model, dtype and device."""

    name: str
    """Key of the step in `STEPS`, e.g. `lora`."""
    shape: Backbone
    dtype: str
    device: torch.device
    registry: Registry

    @property
    def step(self) -> StepBenchmark:
        """The entry of `STEPS` with this name. It has the Method and its config."""
        return STEPS[self.name]

    @property
    def method(self) -> str:
        """Name of the Method."""
        return self.step.method


class LlamaTraining:
    """Training steps of a Llama with a Method attached."""

    def __init__(self, model: nn.Module, adapted: Adapted, shape: Backbone, device: torch.device) -> None:
        self.model, self.adapted, self.shape, self.device = model, adapted, shape, device
        self.losses: list[float] = []
        """Loss of each step so far."""
        self.optimizer: torch.optim.Optimizer | None = None

    def start_training(self) -> None:
        """Make the optimizer."""
        self.optimizer = self.adapted.optimizer(LR, WEIGHT_DECAY) or torch.optim.AdamW(
            self.adapted.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY
        )
        self.model.train()

    def step(self) -> None:
        """Take one step: forward, loss, backward, optimizer, and the Method's `after_step`."""
        assert self.optimizer is not None, "start_training comes first"  # noqa: S101
        self.optimizer.zero_grad(set_to_none=True)
        loss = loss_of(self.model, batch(self.shape, len(self.losses), self.device))
        term = self.adapted.regularizer()
        (loss if term is None else loss + term).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.losses.append(float(loss.detach()))
        self.adapted.after_step(len(self.losses))


class AdaptedLlama(LlamaTraining):
    """A Llama with an implementation of a Method attached, its parity checks, and its training steps."""

    def __init__(self, implementation: Implementation, setting: StepSetting, packer: str = "") -> None:
        """Build the model and attach the Method. packer: name of the implementation that packs a quantised base."""
        step, dtype, shape, device = setting.step, setting.dtype, setting.shape, setting.device
        self.base, self.packer = step.base, packer
        model = llama(shape, DTYPES[dtype], device)
        model.requires_grad_(False)
        config = configure(step.method, step.config)
        bases = adaptable_layers(model, config)
        packed = base_quantisation.PackedBase()
        if step.base:
            base = Base(quantization=step.base, implementation=packer)  # type: ignore[arg-type]
            packed = base_quantisation.pack(model, bases, base, DTYPES[dtype], setting.registry)
            bases = {path: model.get_submodule(path) for path in bases}
        model.eval()
        self.shape, self.device = shape, device  # `_logits` reads them
        self.base_output = inference(model, self._logits)()
        own, original = list(model.parameters()), Original.of(model)
        self.start = initial_tensors(step.method, bases, config, torch.Generator().manual_seed(SEED))
        super().__init__(model, implementation(model, config, torch.Generator().manual_seed(SEED)), shape, device)
        load_start(self.adapted, self.start)
        self.subject = Subject(
            step.method, config, dtype, model, self.adapted, bases, own, original, packed.forms, packed.expected,
            packed.judged,
        )  # fmt: skip

    def start_training(self) -> None:
        """Free the tensors that only the checks before training need, and make the optimizer."""
        del self.subject, self.start, self.base_output
        super().start_training()

    def parity(self) -> list[CheckResult]:
        """Return the results of the parity gate: checks against the reference that every training run must pass first.

        If no check failed, there is one more result, for the loss and the gradients of a batch.
        """
        base = f"{self.base} by {self.packer}" if self.packer else ""
        run_model = inference(self.model, self._logits)
        found = parity_gate.gate(
            self.subject, SEED, run_model, self.base_output, start=self.start, forward=self._logits, base=base
        )
        failed = any(one.outcome == "fail" for one in found)
        return found if failed else [*found, self._loss_and_gradients()]

    def _logits(self, model: Any) -> Tensor:
        logits: Tensor = model(input_ids=batch(self.shape, 0, self.device)[:1, :GATED_TOKENS], use_cache=False).logits
        return logits

    def _loss_and_gradients(self) -> CheckResult:
        """Compare the loss and the gradients of one batch with the reference.

        Adapter tensors are random, and dropout is off.
        """
        subject, case = self.subject, Case("warm", seed=SEED, factors=parity_suite.load(self.subject.method).factors())
        initial = {name: t.detach().clone() for name, t in subject.added().items()}
        warm(subject.added(), case.generator(salt=1))
        computed = self._observe(self.model, subject.adapted.tensors())
        truth, rounded = (self._observe(*whole_model.reference(subject, dtype)) for dtype in ("float64", subject.dtype))
        load(subject.adapted, initial)
        return judged(subject, case, "loss", carried_noise(computed, truth, rounded, subject.dtype))

    def _observe(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        model.eval()
        loss = loss_of(model, batch(self.shape, 0, self.device))
        gradients = torch.autograd.grad(loss, list(tensors.values()))
        return {"loss": loss.detach()} | {f"grad {n}": g for n, g in zip(tensors, gradients, strict=True)}


def frozen_pass(shape: Backbone, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Return a function whose time is a lower bound for the time of a training step.

    The function runs the dense model forward on the batch of step 0, and backward to the embeddings. It trains nothing.
    """
    model, ids = llama(shape, dtype, device).requires_grad_(False).train(), batch(shape, 0, device)
    embedded = model.get_input_embeddings()
    embedded.register_forward_hook(lambda *seen: seen[-1].requires_grad_(True))
    return lambda: loss_of(model, ids).backward()  # type: ignore[no-untyped-call]
