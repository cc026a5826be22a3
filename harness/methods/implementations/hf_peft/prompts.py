"""peft's prompt learning (virtual tokens before every text), attached in place.

For these methods, peft returns a wrapper around the model, but the harness uses the model without a wrapper. So the
model gets a class whose forward pass calls the wrapper and drops the logits of the virtual tokens. This forward pass
corrects two errors of peft. First, peft drops the position ids, so that padding before a text would shift positions.
Second, peft 0.21 generates incorrectly with transformers from 5.24 on: peft reads the cache under the cache's old name,
and so repeats the virtual tokens before every new token.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from harness.assets.model_folder import CACHES
from harness.errors import UsageError
from harness.methods.peft_config import IN_THE_CACHE

if TYPE_CHECKING:
    from torch import Tensor


def attach(model: Any, config: Any, name: str) -> Any:
    """Prepend the virtual tokens of a peft config to every input of `model`; return peft's wrapper."""
    from peft import PeftModelForCausalLM, PeftModelForSequenceClassification

    plain = copy.copy(model)  # shares all modules
    plain._modules = plain._modules.copy()  # except the virtual tokens, which only `model` gets
    if model.can_generate():
        config.task_type, kind = "CAUSAL_LM", PeftModelForCausalLM
        plain.__class__ = _running(type(model), _numbered)
    else:
        config.task_type, kind = "SEQ_CLS", PeftModelForSequenceClassification
    wrapper = kind(plain, config, name)
    restore(model, wrapper)
    return wrapper


def restore(model: Any, wrapper: Any) -> None:
    """Let `model` run through peft's wrapper. A call after `remove` attaches the virtual tokens again."""
    model.__dict__["wrapper"] = wrapper  # no submodule, which would register all parameters twice
    model.__dict__["virtual_tokens"] = wrapper.active_peft_config.num_virtual_tokens
    model.prompt_encoder = wrapper.prompt_encoder
    model.__class__ = _running(type(model), _prompted)


def remove(model: Any) -> None:
    """Undo `attach`."""
    (model.__class__,) = type(model).__bases__
    del model.__dict__["wrapper"], model.__dict__["virtual_tokens"]
    del model.prompt_encoder


def _running(kind: Any, run: Callable[..., Any]) -> Any:
    """Return a subclass of the model class `kind`. Its forward pass calls `run(model, kind.forward, ...)`."""
    own = kind.forward

    @functools.wraps(own)  # preserves the model's signature
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        return run(self, own, *args, **options)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _prompted(
    model: Any,
    _: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **options: Any,
) -> Any:
    """Run peft's forward pass, and return its output.

    If the cache already has the virtual tokens, run the model's own forward pass instead. Raises UsageError if gradient
    checkpointing is on in training and the virtual tokens are passed as a cache.
    """
    import torch

    wrapper = model.wrapper
    plain, kind = wrapper.base_model, wrapper.active_peft_config.peft_type
    plain.training = model.training
    cache = next((options[key] for key in CACHES if options.get(key) is not None), None)
    if cache is not None and cache.get_seq_length():
        if attention_mask is not None:
            ones = attention_mask.new_ones((len(attention_mask), model.virtual_tokens))
            attention_mask = torch.cat((ones, attention_mask), dim=1)
        if position_ids is not None:
            options["position_ids"] = position_ids + model.virtual_tokens
        return plain(input_ids=input_ids, attention_mask=attention_mask, **options)
    if kind in IN_THE_CACHE:
        if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            what = f"{kind.value} passes its tokens as a cache, which gradient checkpointing drops"
            raise UsageError(what, where="peft", hint="write `checkpointing: false`")
        options = {key: value for key, value in options.items() if key not in CACHES}  # peft makes its own cache
        if position_ids is not None:
            options["position_ids"] = position_ids
    if kind == "MULTITASK_PROMPT_TUNING":
        # A Cell has one task, so every text has task 0.
        options["task_ids"] = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
    output = wrapper(input_ids=input_ids, attention_mask=attention_mask, **options)
    if output.logits.dim() > 2:  # a causal model also returns the logits of the virtual tokens
        output.logits = output.logits[:, -input_ids.shape[1] :]
    return output


def _numbered(model: Any, own: Any, **options: Any) -> Any:
    """Run the model's forward pass `own` with corrected arguments, and return its output.

    The corrected position ids do not count padding between virtual tokens and text. The cache gets the argument name
    that the model expects: peft passes it under an old name, of which transformers warns, and which it refuses from 5.40.
    """
    parameters = inspect.signature(own).parameters
    mask = options.get("attention_mask")
    if "position_ids" in parameters and options.get("inputs_embeds") is not None and mask is not None:
        options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0).long()
    new, old, *_ = CACHES
    if old in options and new in parameters:
        options[new] = options.pop(old)
    return own(model, **options)
