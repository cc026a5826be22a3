"""`hf-peft`: the methods of HuggingFace peft, attached in place by `get_peft_model` with its default options.

This is what a user of peft gets: on a model in bfloat16 or float16 the adapter is float32, and each layer casts its input up
and its output down. `inject_adapter_in_model`, which diffusers uses, would leave the adapter in 16 bits.
"""

from __future__ import annotations

from harness.methods.implementations.hf_peft.adalora import adalora
from harness.methods.implementations.hf_peft.any_config import any_method
from harness.methods.implementations.hf_peft.lora import dora, lora, pissa, reloaded_pissa
from harness.methods.implementations.hf_peft.multi_lora import multi_lora_linear
from harness.methods.implementations.hf_peft.qlora import qlora
from harness.methods.implementations.hf_peft.vera import second_vera, vera
from harness.methods.registry import Implementation


def implementations() -> list[Implementation]:
    """Return the Implementations of this package. They import peft and torch on their first call."""
    return [one for one in globals().values() if isinstance(one, Implementation)]


__all__ = [
    "adalora",
    "any_method",
    "dora",
    "implementations",
    "lora",
    "multi_lora_linear",
    "pissa",
    "qlora",
    "reloaded_pissa",
    "second_vera",
    "vera",
]
