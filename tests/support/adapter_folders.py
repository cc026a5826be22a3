"""Bases and adapter folders for tests of model servers. `python tests/support/adapter_folders.py BASE OUT` writes FOUR."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
FOUR: dict[str, dict[str, Any]] = {
    "narrow": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": list(ATTENTION)},
    "linear": {"r": 8, "lora_alpha": 16, "target_modules": [*ATTENTION, *MLP]},
    "mlp": {"r": 8, "lora_alpha": 8, "target_modules": list(MLP)},
}
"""Name -> config of an adapter."""


def base(folder: Path, seed: int = 0, **facts: Any) -> Path:
    """Save a Llama of two layers with seeded random weights, and return the folder. facts: changes of its config."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "max_position_embeddings": 128,
    } | facts  # fmt: skip
    config = LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def adapter(base_folder: Path, folder: Path, size: float = 0.5, **config: Any) -> Path:
    """Save a LoRA adapter in the format of peft, and return the folder.

    size: norm of the update of each weight, relative to the weight's own norm.
    """
    weights = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).state_dict()
    generator = torch.Generator().manual_seed(sum(map(ord, folder.name)))
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    tensors = {}
    for key, weight in weights.items():
        if key.split(".")[-2] in config["target_modules"]:
            A = torch.randn(config["r"], weight.shape[1], generator=generator)
            B = torch.randn(weight.shape[0], config["r"], generator=generator)
            B *= size * weight.norm() / (scaling * (B @ A).norm())
            path = key.removesuffix(".weight")
            tensors |= {f"base_model.model.{path}.lora_{name}.weight": one for name, one in (("A", A), ("B", B))}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    full = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "base_model_name_or_path": "", **config}
    (folder / "adapter_config.json").write_text(json.dumps(full), encoding="utf-8")
    return folder


def four(base_folder: Path, folder: Path, size: float = 0.5) -> dict[str, Path]:
    """Save the adapters FOUR, and return their folders."""
    return {name: adapter(base_folder, folder / name, size, **config) for name, config in FOUR.items()}


if __name__ == "__main__":
    four(Path(sys.argv[1]), Path(sys.argv[2]))
