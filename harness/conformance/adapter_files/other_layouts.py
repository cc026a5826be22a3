"""Recognise LoRA files that other programs write in other layouts, by their keys. Such files are not judged."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Layout in which one program writes LoRA files."""

    name: str
    file: str
    """Name of the file that the program writes. Empty if it has no fixed name."""
    keys: re.Pattern[str]
    """Pattern that matches the start of every key of such a file."""


LAYOUTS = (
    Layout(
        "diffusers", "pytorch_lora_weights.safetensors",
        re.compile(r"(unet|transformer(_2)?|text_encoder(_\d)?|prior|decoder)\..*(\.lora\b|lora_(A|B|linear_layer)|_lora\.|\.alpha$)"),
    ),
    Layout(
        "kohya (sd-scripts)", "",
        re.compile(r"lora_(unet|te\d?|transformer|prior)_\w+\.(lora_(down|up|mid)|alpha|dora_scale|hada_|lokr_)"),
    ),
    Layout("ComfyUI", "", re.compile(r"diffusion_model\..*\.(lora_(A|B|down|up)|alpha|dora_scale)\b")),
    Layout("mlx-lm", "adapters.safetensors", re.compile(r".+\.(lora_[ab]|m)$")),
)  # fmt: skip


def layout_of(keys: Collection[str]) -> str:
    """Return the name of the layout in LAYOUTS that all keys of a file fit, or an empty string if there is none."""
    return next((one.name for one in LAYOUTS if keys and all(map(one.keys.match, keys))), "")
