"""Load a model for a task. An encoder has the classification head of its checkpoint, or a random new head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.assets import conv1d
from harness.cell.training import head
from harness.conformance.comparison.stacked_experts import one_by_one
from harness.conformance.tolerance_constants import FUTURE_TOKEN_LEAKAGE
from harness.errors import AssetError, UsageError
from harness.process.out_of_memory import shortage

_COMPILER = ("torch._dynamo", "torch._inductor")
_PROBED_TOKENS = 4
"""Number of tokens of the text that `future_token_leakage` reads. A suite's `max_tokens` cannot be smaller."""
_NAMED = 6
"""Maximum number of weights that a note names. The head of a usual model has no more weights."""


@dataclass
class Loaded:
    """A model on its device, with its tokenizer."""

    model: Any
    tokenizer: Any
    head: dict[str, nn.Parameter]
    """Path of each parameter of an encoder's head -> the parameter. Every Method trains the head."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the Record."""


def load(
    path: Path,
    kind: str,
    labels: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    *,
    check_causal: bool = True,
) -> Loaded:
    """Load an encoder with a classification head of `labels` classes, or a causal model, from a local folder.

    If the checkpoint's head has another number of classes, a new head replaces it. Raises AssetError if the folder
    cannot be read, or if its weights do not match its config.json. For a causal model, also raises AssetError if
    weights are missing, or if the output depends on later tokens. check_causal: False to leave out the latter check, which
    takes a forward and a backward pass, for a model that has passed it before.
    """
    from transformers import AutoTokenizer

    model, info = _read(path, kind, dtype=dtype, **({"num_labels": labels} if kind == "encoder" else {}))
    missing = sorted(info["missing_keys"])
    if kind == "causal" and missing:
        what = f"the checkpoint lacks {len(missing)} weights of a causal model: {_some(missing)}"
        raise AssetError(what, where=str(path), hint="declare an encoder with `kind: encoder`")
    trains = head.head_of(model, kind, missing)
    sizes = {name: (tuple(saved), tuple(wanted)) for name, saved, wanted in info["mismatched_keys"]}
    if wrong := sorted(sizes.keys() - trains.keys()):
        saved, wanted = sizes[wrong[0]]
        what = f"the weights do not match its config.json: {wrong[0]} has the shape {saved}, and {wanted} in the config"
        raise AssetError(what, where=str(path), hint="copy or fetch its folder again, or correct config.json")
    written = conv1d.as_linear(model)
    one_by_one(model.to(device), dtype)
    if kind == "causal" and check_causal and (share := future_token_leakage(model)) > FUTURE_TOKEN_LEAKAGE:
        raise AssetError(
            f"{type(model).__name__} is configured as no causal model: its output depends on later tokens too "
            f"({share:.2g} of its gradient), so it sees the answers, and a score would have no meaning",
            where=str(path),
            hint="declare it with `kind: encoder`; a decoder of such a family has `is_decoder: true` in config.json",
        )
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    drawn = head.draw(model, [name for name in sorted(trains) if name in missing or name in sizes], seed)
    notes = [conv1d.NOTE.format(written)] if written else []
    start = f"{model.base_model_prefix}."
    if inside := [name for name in drawn if name.startswith(start)]:
        notes.append(f"the checkpoint lacks {_some(inside)}: initialised at random, they train with the head")
    if others := [name for name in drawn if name in sizes]:
        notes.append(f"the checkpoint's head does not have {labels} classes: {_some(others)} initialised at random")
    if own := [name for name in trains if name not in drawn]:
        notes.append(f"the head has {_some(own)} from the checkpoint: training continues from there")
    return Loaded(model, tokenizer, {name: model.get_parameter(name) for name in sorted(trains)}, notes)


def _read(path: Path, kind: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    factory: Any = AutoModelForSequenceClassification if kind == "encoder" else AutoModelForCausalLM
    # Without `use_kernels`, transformers 5.25 fetches kernels of the hub for the model's layers: another machine would
    # measure another model, and on the meta device loading fails.
    options |= {
        "local_files_only": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
        "use_kernels": False,
    }
    try:
        model, info = factory.from_pretrained(path, **options)
    except (SafetensorError, OSError, ValueError) as error:
        if shortage(error):
            raise
        first = (str(error).splitlines() or [""])[0]
        what = f"the model cannot be read: {type(error).__name__}: {first}"
        hint = "copy or fetch its folder again, or choose a model that this release of transformers knows"
        raise AssetError(what, where=str(path), hint=hint) from error
    return model, info


def _some(names: list[str]) -> str:
    """Return a text with the first of `names`. If it leaves names out, it says how many there are."""
    return ", ".join(names[:_NAMED]) + (f" ... ({len(names)} in all)" if len(names) > _NAMED else "")


@cache
def lacks(checkpoint: str) -> frozenset[str]:
    """Return the names of the weights that an encoder's checkpoint lacks.

    checkpoint: path of the checkpoint's folder; empty if the model has no checkpoint, and then the result is empty too.
    The weights are not read, because the model is loaded onto the meta device. Raises AssetError if the folder cannot
    be read.
    """
    return frozenset(_read(Path(checkpoint), "encoder", device_map="meta")[1]["missing_keys"] if checkpoint else ())


@contextmanager
def checkpointing(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Inside the context, use gradient checkpointing for each block of a transformers model, if `enabled`.

    torch's reentrant variant of checkpointing is not used, because it would give adapters in the first block no
    gradient. Raises UsageError for a model that does not support checkpointing.
    """
    if not enabled:
        yield
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UsageError(
            f"{type(model).__name__} does not support gradient checkpointing", hint="write `checkpointing: false`"
        )
    # transformers 5.0 renamed the attribute.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{name}_checkpointing_disable")()


@contextmanager
def compiled(model: nn.Module, enabled: bool, notes: list[str]) -> Iterator[None]:
    """Compile the model by torch.compile inside the context, if `enabled`.

    At the end, a sentence about the compilation is added to `notes`. The modules and their names stay the same. Raises
    UsageError if the compiler fails.
    """
    if not enabled:
        yield
        return
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    model.compile()
    try:
        yield
    except Exception as error:
        if type(error).__module__.startswith(_COMPILER) and not shortage(error):
            reason = next(filter(None, (line.strip() for line in str(error).splitlines())), type(error).__name__)
            what = f"torch.compile failed: {type(error).__name__}: {reason}"
            hint = "on a CPU it needs a C++ compiler with OpenMP (g++); or write `compile: false`"
            raise UsageError(what, where=type(model).__name__, hint=hint) from error
        raise
    finally:
        # Many lengths or layers may exceed the compiler's limits. Then it runs the rest uncompiled.
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        tried, done = (counters["frames"][name] for name in ("total", "ok"))
        notes.append(
            f"torch.compile, in the parity gate and in training: {graphs} graphs, {breaks} breaks between them, "
            f"{done} of {tried} frames compiled, the others ran uncompiled"
        )
        model._compiled_call_impl = None  # set by Module.compile(), which has no inverse
        torch.compiler.reset()


def graphs() -> int:
    """Return the number of graphs that torch.compile has made so far inside the context of `compiled`."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def future_token_leakage(model: Any) -> float:
    """Return how much the logits at all earlier positions depend on the last token: 0 for a causal model.

    The number is the norm of the gradient at the last token's embedding, divided by the norm of the gradient at all
    embeddings. If the logits do not depend on the last token, the gradient is exactly zero in every dtype. Comparing
    the logits before and after a change of the last token would be less exact: rounding in 16 bits could hide a
    difference.
    """
    found: list[Tensor] = []

    def watch(module: nn.Module, arguments: Any, embedded: Tensor) -> Tensor:
        found.append(embedded.detach().requires_grad_(True))
        return found[-1].clone()  # some models scale it in place

    ids = torch.arange(_PROBED_TOKENS, device=model.device)[None] % model.config.vocab_size
    hook = model.get_input_embeddings().register_forward_hook(watch)
    try:
        with torch.enable_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, :-1]
        dy = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad(logits, found[0], dy.to(logits))
    finally:
        hook.remove()
    of_tokens = gradient.double().flatten(0, -2)  # a single text, so the order of batch and length does not matter
    every = of_tokens.norm()
    return float(of_tokens[-1].norm() / every) if every > 0 else 0.0
