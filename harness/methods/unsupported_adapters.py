"""Find the keys of an adapter's config that `reference/adapter_file.py` does not implement. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

UNSUPPORTED = {
    "alora_invocation_tokens": "the adapter acts only after certain tokens",
    "arrow_config": "a router mixes adapters",
    "ensure_weight_tying": "tied layers share one adapter",
    "kasa_config": "the base weight is truncated first",
    "layer_replication": "the model has more layers than the base",
    "monteclora_config": "the adapter is random",
    "trainable_token_indices": "single rows of the embedding are replaced",
    "use_bdlora": "A or B is block-diagonal",
    "use_qalora": "inputs are pooled",
}
"""Key of an adapter_config.json that the reference does not implement -> what the key changes."""
_INITS = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""If init_lora_weights begins with one of these, peft changes the base weight before training."""


def unsupported(config: Mapping[str, Any]) -> dict[str, str]:
    """Map each key of `config`, an adapter_config.json, that the reference does not implement to what the key changes."""
    found = {key: meaning for key, meaning in UNSUPPORTED.items() if config.get(key)}
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_INITS):
        found[f"init_lora_weights={init}"] = "the base weight of the training run is not that of the base model"
    return found


def reason(found: Mapping[str, str]) -> str:
    """Return the result of `unsupported` as one text."""
    return "; ".join(f"{key}: {meaning}" for key, meaning in found.items())
