"""A small Llama, a config of every Method for it, and the predicted memory."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from harness.conformance.subject import DTYPES
from harness.memory_model import counting

SMALL = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 128,
}  # fmt: skip
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8, "targets": LINEAR},
    "dora": {"rank": 8, "targets": ["q_proj", "v_proj", "up_proj"]},
    "adalora": {"rank": 8, "target_rank": 4, "targets": LINEAR},
    "vera": {"rank": 32, "targets": LINEAR},
    "qlora": {"rank": 8, "targets": LINEAR},
    "pissa": {"rank": 8, "targets": ["q_proj", "down_proj"]},
    "galore": {"rank": 16, "targets": LINEAR},
    "full": {},
}


def off(predicted: int, measured: int) -> float:
    """Return |predicted - measured| / measured. If `measured` is 0, return 1 for a positive prediction, otherwise 0."""
    return abs(predicted - measured) / measured if measured else float(predicted > 0)


def llama(dtype: str) -> Any:
    torch.manual_seed(0)
    facts = {k: v for k, v in SMALL.items() if k != "model_type"}
    return LlamaForCausalLM._from_config(LlamaConfig(**facts), dtype=DTYPES[dtype]).train()


def predicted(method: str, dtype: str) -> dict[str, Any]:
    found = counting.count(SMALL, "causal", dtype, {method: [METHODS[method]]}, [])
    (one,) = found["methods"][method]
    assert not one["error"]
    return dict(one) | {"logits": found["logits"]}
