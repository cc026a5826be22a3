"""Training loop of trl: its SFTTrainer, with the harness's adapted model, batches, optimizer and schedule.

SFTTrainer gets token ids and completion masks, pads them itself, and computes its own loss. `ALIGNED` switches off each of
its defaults that would change training. This module imports trl, an optional dependency.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import datasets
import torch
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from harness.cell.training import loop
from harness.cell.training.batches import Batch
from harness.cell.training.loop import StepLog, StepSamples
from harness.cell.training.loops import RefusedOptions
from harness.cell.training.unsaved_optimizer import UnsavedOptimizer
from harness.errors import Unsupported
from harness.methods.spec import Adapted
from reference.shared.layerwise import Layerwise

ALIGNED: Mapping[str, Any] = {
    "bf16": False,
    "max_grad_norm": 0.0,
    "train_sampling_strategy": "sequential",
    "completion_only_loss": True,
    "max_length": None,
    "gradient_checkpointing": False,  # `harness.cell.training.model.checkpointing` switches it on, if the suite says so
}
"""Field of SFTConfig -> value to use instead of its default. The default would change training, or would override the
suite."""
_QUIET: Mapping[str, Any] = {
    "save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True,
    "dataloader_pin_memory": False,
}  # fmt: skip
_LAUNCHERS = (
    "ACCELERATE_",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "MV2_COMM_WORLD_SIZE",
)
"""Prefixes of environment variables by which accelerate changes training, e.g. its precision."""
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def train(
    adapted: Adapted,
    head: Sequence[nn.Parameter],
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    seed: int,
    report: Callable[[int, float], None],
    accumulate: int = 1,
    layerwise: Layerwise | None = None,
    *,
    options: Mapping[str, Any] = MappingProxyType({}),
    own_optimizer: bool = False,
) -> StepSamples:
    """Train as `loop.train` does, but by SFTTrainer, and return the measured numbers of all steps.

    A step is timed from SFTTrainer's `on_step_begin` to the end of the optimizer's step. The time between two steps, in
    which SFTTrainer makes the next batch, is summed in `outside_seconds`. The gradients of the last step remain, as
    after `loop.train`. options: fields of SFTConfig that differ from `ALIGNED`. own_optimizer: whether SFTTrainer makes
    its own optimizer and schedule. Raises Unsupported for a training that SFTTrainer cannot do, RefusedOptions if
    SFTTrainer refuses `options`, and the errors of `loop.train`.
    """
    refuse(adapted, batches)
    log = StepLog(adapted, optimizer, len(batches), report)
    watch = _Watch(adapted, loop.trainable(adapted, head), optimizer, log, seed)
    parts = [part for batch in batches for part in batch.parts(accumulate)]
    optimizers = (None, None) if own_optimizer else (UnsavedOptimizer(optimizer), schedule)
    _run(adapted, parts, accumulate, optimizers, watch, options)
    return log.samples


def step(adapted: Adapted, parts: Sequence[Batch], optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Take one optimizer step over the parts of a batch. The Method's `after_step` is not called.

    seed: as in `loop.step`; not used.
    """
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    _run(adapted, parts, len(parts), (UnsavedOptimizer(optimizer), schedule), _OneStep(adapted), {})


def defaults() -> dict[str, Any]:
    """Return the default of each field of SFTConfig."""
    return {one.name: one.default for one in dataclasses.fields(SFTConfig)}


def refuse(adapted: Adapted, batches: Sequence[Batch]) -> None:
    """Raise Unsupported if SFTTrainer would train differently from `loop.train`."""
    if not all(any(batch.answers) for batch in batches):
        raise Unsupported("SFTTrainer trains causal models only; write `loop: harness` for an encoder")
    output: Any = adapted.model.get_output_embeddings()  # type: ignore[operator]
    of_adapter = {name for name, _ in output.named_parameters()} - {"weight", "bias"}
    if of_adapter or any(layer is output and not isinstance(layer, nn.Linear) for layer in adapted.layers.values()):
        # trl multiplies by `lm_head.weight` itself, so an adapter of this layer would be ignored.
        raise Unsupported("SFTTrainer ignores an adapter of the output layer; leave it out of `targets`")
    if where := _dropout(adapted.model):
        raise Unsupported(
            f"`{where}` of the model is above 0: SFTTrainer pads on the other side, so a mask falls on other tokens; write "
            "`loop: harness`, or set it to 0 in a copy of the model"
        )


def _dropout(model: nn.Module) -> str:
    """Return the path of a dropout above 0 in a model. If there is none, return an empty string.

    The modules are searched, because the class of a model may set a dropout for which config.json has no key.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            return f"{path}.p"
        for name, value in vars(module).items():
            if name.endswith("dropout") and type(value) in (int, float) and value > 0:
                return f"{path}.{name}"
    return ""


class _OneStep(TrainerCallback):  # type: ignore[misc]
    """A callback that adds the Method's own term to the loss, and stores the losses and sizes of the parts of a step."""

    def __init__(self, adapted: Adapted) -> None:
        self.adapted = adapted
        self.losses: list[Tensor] = []
        self.padded_tokens = self.tokens = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forget the losses and sizes of the previous step, and compute the gradients of the Method's own loss term."""
        self.losses.clear()
        self.padded_tokens = self.tokens = 0
        if (term := self.adapted.regularizer()) is not None:
            term.backward()


class _Watch(_OneStep):
    """A callback that measures each step, and calls the Method's `after_step`."""

    def __init__(
        self, adapted: Adapted, trained: list[nn.Parameter], optimizer: torch.optim.Optimizer, log: StepLog, seed: int
    ) -> None:
        super().__init__(adapted)
        self._trained, self._optimizer, self._log, self._seed = trained, optimizer, log, seed
        self._device = trained[0].device
        self._started = self._cpu = 0.0
        self._ended: float | None = None
        self.gradients: list[Tensor | None] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the global random state of the step, and start timing."""
        torch.manual_seed(loop.seed_of_step(self._seed, state.global_step))
        loop.synchronize(self._device)
        self._started, self._cpu = time.perf_counter(), time.process_time()
        if self._ended is not None:
            samples = self._log.samples
            samples.outside_seconds = (samples.outside_seconds or 0.0) + self._started - self._ended
        super().on_step_begin(args, state, control)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the timing of the step, and store the step's numbers."""
        step = state.global_step + 1
        self.adapted.after_step(step)
        loss = float(torch.stack(self.losses).sum())
        loop.synchronize(self._device)
        self._log.add_time(time.perf_counter() - self._started, time.process_time() - self._cpu)
        self._log.add(loss, loop.norm_of(self._trained, self._optimizer), self.tokens, self.padded_tokens)
        if step == state.max_steps:
            self.gradients = [p.grad for p in self._trained]
        self._ended = time.perf_counter()


class _Trainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that gives the loss of each part of a batch to `watch`. SFTTrainer's log has only means over steps."""

    def __init__(self, *arguments: Any, watch: _OneStep, **options: Any) -> None:
        super().__init__(*arguments, callbacks=[watch], **options)
        self.remove_callback(PrinterCallback)
        self._watch = watch

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self._watch.padded_tokens += inputs["input_ids"].numel()
        whole = inputs.get("attention_mask", inputs["input_ids"])
        self._watch.tokens += int(whole.sum()) if "attention_mask" in inputs else whole.numel()
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._watch.losses.append(loss)
        return loss


def _run(
    adapted: Adapted,
    parts: Sequence[Batch],
    accumulate: int,
    optimizers: tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler] | tuple[None, None],
    watch: _OneStep,
    options: Mapping[str, Any],
) -> None:
    """Train on `parts`, in their order. Each optimizer step takes `accumulate` of them."""
    device = parts[0].labels.device
    restored = _restored(adapted.model)
    with tempfile.TemporaryDirectory() as folder, restored, _without_launcher(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers renames settings that trl still has
        values = {
            **ALIGNED, **_QUIET, "output_dir": folder, "use_cpu": device.type == "cpu",
            "max_steps": len(parts) // accumulate, "per_device_train_batch_size": len(parts[0].answers),
            "gradient_accumulation_steps": accumulate, **options,
        }  # fmt: skip
        with _refusals(options):
            arguments = SFTConfig(**values)
            if arguments.n_gpu > 1:
                raise Unsupported(
                    f"SFTTrainer would divide each batch among the {arguments.n_gpu} visible GPUs; set CUDA_VISIBLE_DEVICES "
                    "to one of them"
                )
            trainer = _Trainer(
                model=adapted.model,
                args=arguments,
                train_dataset=rows_of(parts),
                processing_class=_no_words(),
                optimizers=optimizers,
                watch=watch,
            )
        trainer.train()
    if isinstance(watch, _Watch):
        for parameter, gradient in zip(watch._trained, watch.gradients, strict=True):
            parameter.grad = gradient
    del trainer
    gc.collect()  # frees the trainer, which refers to itself


def rows_of(parts: Sequence[Batch]) -> datasets.Dataset:
    """Return the texts of batches, without padding, as a data set of trl. Its mask marks the tokens that have a loss."""
    ids: list[list[int]] = []
    masks: list[list[int]] = []
    for part in parts:
        tokens, mask = part.inputs["input_ids"].tolist(), part.inputs["attention_mask"].tolist()
        for row, answer in enumerate(part.answers):
            ids.append([token for token, real in zip(tokens[row], mask[row], strict=True) if real])
            masks.append([0] * (len(ids[-1]) - answer) + [1] * answer)
    return datasets.Dataset.from_dict({"input_ids": ids, "completion_mask": masks})


def _no_words() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose only token is the padding, number 0. The texts are token ids already."""
    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))  # noqa: S106
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>")  # noqa: S106


@contextmanager
def _refusals(options: Mapping[str, Any]) -> Iterator[None]:
    """If `options` is not empty, turn an error inside the context into RefusedOptions: an option may be its cause."""
    try:
        yield
    except Unsupported:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        if not options:
            raise
        raise RefusedOptions(str(error) or type(error).__name__) from error


@contextmanager
def _without_launcher() -> Iterator[None]:
    """Hide the environment variables of launchers such as `accelerate launch`. Only the suite may decide how to train."""

    def take() -> dict[str, str]:
        return {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(_LAUNCHERS)}

    hidden = take()
    try:
        yield
    finally:
        take()  # removes those that transformers and accelerate have set
        os.environ.update(hidden)


@contextmanager
def _restored(model: Any) -> Iterator[None]:
    """At the end of the context, restore what SFTTrainer changes in a model: its forward pass, configs and tags."""
    attributes = {name: value for name, value in vars(model).items() if not isinstance(value, dict)}
    configs = [model.config, *([model.generation_config] if hasattr(model, "generation_config") else [])]
    ids = [{name: getattr(config, name, None) for name in (*_TOKEN_IDS, "use_cache")} for config in configs]
    bar = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not bar:
            datasets.enable_progress_bars()
        for name in [
            name for name in vars(model) if name not in attributes and not isinstance(vars(model)[name], dict)
        ]:
            delattr(model, name)
        for name, value in attributes.items():
            if vars(model).get(name) is not value:
                setattr(model, name, value)
        for config, old in zip(configs, ids, strict=True):
            for name, value in old.items():
                setattr(config, name, value)
