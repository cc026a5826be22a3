"""`hf-peft`: the methods of HuggingFace peft, attached in place by `get_peft_model` with its default options.

A user of peft gets the same adapters: on a model in bfloat16 or float16 the adapter is float32, and each layer casts its
input to float32 and its output back. `inject_adapter_in_model`, which diffusers uses, would leave the adapter in 16 bits.
"""

from __future__ import annotations

from harness.methods.registry import Implementation, implementations_in


def implementations() -> list[Implementation]:
    """Return the Implementations of this package. They import peft and torch on their first call."""
    return implementations_in(__name__)
