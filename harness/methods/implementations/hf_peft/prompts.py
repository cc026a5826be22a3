"""peft's prompt learning in place: virtual tokens before every text, by the forward pass of peft's own model.

peft wraps a model for these methods; the harness trains, scores and times the model itself. So the model gets a class with a
forward pass that calls peft's wrapper and returns the logits of the text alone. It corrects two things: padding before a
text must not shift positions, but peft drops the position ids; and peft 0.21 generates incorrectly with transformers from
5.24 on, because it reads the cache under its old name and repeats its tokens before every new one.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.assets.model_folder import CACHES
from harness.errors import UsageError
from harness.methods.peft_config import IN_THE_CACHE


def attach(model: Any, wanted: Any, name: str) -> Any:
    """Prepend the virtual tokens of peft's config `wanted` to every input of `model`; return peft's wrapper."""
    from peft import PeftModelForCausalLM, PeftModelForSequenceClassification

    plain = copy.copy(model)  # shares all modules
    plain._modules = plain._modules.copy()  # except the virtual tokens, which only `model` gets
    if model.can_generate():
        wanted.task_type, kind = "CAUSAL_LM", PeftModelForCausalLM
        plain.__class__ = _running(type(model), _numbered)
    else:
        wanted.task_type, kind = "SEQ_CLS", PeftModelForSequenceClassification
    around = kind(plain, wanted, name)
    restore(model, around)
    return around


def restore(model: Any, around: Any) -> None:
    """Run `model` through its wrapper `around`; also undoes `remove`."""
    model.__dict__["around"] = around  # no submodule, which would register all parameters twice
    model.__dict__["virtual_tokens"] = around.active_peft_config.num_virtual_tokens
    model.prompt_encoder = around.prompt_encoder
    model.__class__ = _running(type(model), _prompted)


def remove(model: Any) -> None:
    """Undo `attach`."""
    (model.__class__,) = type(model).__bases__
    del model.__dict__["around"], model.__dict__["virtual_tokens"]
    del model.prompt_encoder


def _running(kind: Any, run: Callable[..., Any]) -> Any:
    """Return a subclass of `kind` with the forward pass `run(model, forward of kind, ...)`."""
    own = kind.forward

    @functools.wraps(own)  # preserves the model's signature
    def forward(self: Any, *args: Any, **given: Any) -> Any:
        return run(self, own, *args, **given)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _prompted(
    model: Any,
    _: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **given: Any,
) -> Any:
    """Run peft's forward pass, or the model's own if the cache already has the virtual tokens."""
    around = model.around
    plain, kind = around.base_model, around.active_peft_config.peft_type
    plain.training = model.training
    cache = next((given[key] for key in CACHES if given.get(key) is not None), None)
    if cache is not None and cache.get_seq_length():
        if attention_mask is not None:
            seen = attention_mask.new_ones((len(attention_mask), model.virtual_tokens))
            attention_mask = torch.cat((seen, attention_mask), dim=1)
        if position_ids is not None:
            given["position_ids"] = position_ids + model.virtual_tokens
        return plain(input_ids=input_ids, attention_mask=attention_mask, **given)
    if kind in IN_THE_CACHE:
        if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            what = f"{kind.value} passes its tokens as a cache, which gradient checkpointing drops"
            raise UsageError(what, where="peft", hint="write `checkpointing: false`")
        given = {key: value for key, value in given.items() if key not in CACHES}  # peft makes its own
        if position_ids is not None:
            given["position_ids"] = position_ids
    if kind == "MULTITASK_PROMPT_TUNING":
        given["task_ids"] = torch.zeros(
            len(input_ids), dtype=torch.long, device=input_ids.device
        )  # the Cell's one task
    seen = around(input_ids=input_ids, attention_mask=attention_mask, **given)
    if seen.logits.dim() > 2:  # a causal model's, of the virtual tokens too
        seen.logits = seen.logits[:, -input_ids.shape[1] :]
    return seen


def _numbered(model: Any, own: Any, **given: Any) -> Any:
    """Run `own` with position ids that padding between virtual tokens and text does not shift.

    Also rename peft's cache as the model expects it; otherwise transformers warns, and from 5.40 on raises.
    """
    takes = inspect.signature(own).parameters
    mask = given.get("attention_mask")
    if "position_ids" in takes and given.get("inputs_embeds") is not None and mask is not None:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0).long()
    old, new = CACHES[1], CACHES[0]
    if old in given and new in takes:
        given[new] = given.pop(old)
    return own(model, **given)
