"""Folders in the layouts that training programs leave: a small LoRA adapter, a log, and each program's own files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LOSSES = (4.6, 4.1, 3.4, 3.0)
"""Logged losses, one per ten steps."""
_CARD = "---\nlibrary_name: peft\ntags:\n- lora\n{tags}---\n\n# Model card\n"
_AXOLOTL = """\
<details><summary>See axolotl config</summary>

axolotl version: `0.19.0`
```yaml
base_model: {base}
learning_rate: 2e-4
micro_batch_size: 2
load_in_4bit: true
```
</details>
"""


def adapter(folder: Path, base: Path, *, scale: float = 0.02, **changes: Any) -> Path:
    """Write a LoRA adapter of rank 4 with random tensors for the Llama in `base`, in peft's format, without peft.

    scale: standard deviation of B. changes: keys of the config to replace.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": 4, "lora_alpha": 8,
        "lora_dropout": 0.0, "bias": "none", "target_modules": ["q_proj", "v_proj"], "inference_mode": True,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    with safe_open(base / "model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  # no mapping
            if key.endswith(("q_proj.weight", "v_proj.weight")):
                rows, columns = file.get_slice(key).get_shape()
                start = f"base_model.model.{key.removesuffix('.weight')}"
                tensors[f"{start}.lora_A.weight"] = torch.randn(4, columns, generator=generator) / columns**0.5
                tensors[f"{start}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * scale
    (folder / "adapter_config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def state(folder: Path, losses: Sequence[float] = LOSSES, **more: float) -> None:
    """Write trainer_state.json with one logged loss per ten steps. more: further keys of each entry."""
    log: list[dict[str, Any]] = [{"step": 10 * (k + 1), "loss": loss, **more} for k, loss in enumerate(losses)]
    log.append({"step": 10 * len(losses), "train_loss": sum(losses) / len(losses), "train_runtime": 9.0})
    facts = {"global_step": 10 * len(losses), "train_batch_size": 2, "logging_steps": 10, "log_history": log}
    (folder / "trainer_state.json").write_text(json.dumps(facts), encoding="utf-8")


def _checkpoint(folder: Path, base: Path, number: int, **more: float) -> Path:
    inner = adapter(folder / f"checkpoint-{number}", base)
    state(inner, LOSSES[: number // 10], **more)
    for pickle in ("training_args.bin", "optimizer.pt", "rng_state.pth"):
        (inner / pickle).write_bytes(b"not a pickle: whoever opens this file fails")
    return inner


def trl(folder: Path, base: Path) -> Path:
    """Adapter and card in the folder; the log only in the checkpoints."""
    adapter(folder, base)
    (folder / "README.md").write_text(_CARD.format(tags="- sft\n- trl\n"), encoding="utf-8")
    for number in (20, 40):
        _checkpoint(folder, base, number)
    return folder


def axolotl(folder: Path, base: Path) -> Path:
    """As trl, with the whole config in the card."""
    trl(folder, base)
    card = _CARD.format(tags="- axolotl\n") + _AXOLOTL.format(base=base)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def llama_factory(folder: Path, base: Path) -> Path:
    """Adapter, log and settings in the folder."""
    adapter(folder, base)
    state(folder)
    (folder / "training_args.yaml").write_text("learning_rate: 5.0e-05\nquantization_bit: 4\n", encoding="utf-8")
    (folder / "trainer_log.jsonl").write_text('{"current_steps": 10, "loss": 4.6}\n', encoding="utf-8")
    return folder


def ms_swift(folder: Path, base: Path) -> Path:
    """Nothing but checkpoints, args.json, and a peak of memory in the log."""
    folder.mkdir(parents=True)
    for number in (20, 40):
        inner = _checkpoint(folder, base, number, **{"memory(GiB)": 1.5})
        (inner / "args.json").write_text(json.dumps({"learning_rate": 1e-4, "quant_bits": None}), encoding="utf-8")
    (folder / "args.json").write_text(json.dumps({"learning_rate": 1e-4, "quant_bits": None}), encoding="utf-8")
    return folder


def unsloth(folder: Path, base: Path) -> Path:
    """As trl, with a key in adapter_config.json."""
    trl(folder, base)
    adapter(folder, base, auto_mapping={"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True})
    return folder


LAYOUTS: dict[str, Callable[[Path, Path], Path]] = {
    "trl": trl, "Axolotl 0.19.0": axolotl, "LLaMA-Factory": llama_factory, "ms-swift": ms_swift, "Unsloth": unsloth,
}  # fmt: skip
"""Name of the program, as it is recognised -> function that writes a folder in its layout."""
