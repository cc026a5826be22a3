"""Convert a GGUF file to a model folder, in a separate process: `python -m harness.assets.gguf_model SRC.gguf DST`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(source: Path, destination: Path) -> None:
    """Write the dequantised weights as fp16 safetensors into the folder `destination`, with config and tokenizer."""
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    quantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # transformers cannot save a model that it has loaded from GGUF. The loaded weights are ordinary tensors, so they are
    # copied to a new model of the same architecture.
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.half().save_pretrained(destination)
    AutoTokenizer.from_pretrained(**where).save_pretrained(destination)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
