"""Measure the tensors that a Method's layers save for their backward pass. The layers are called on the meta device."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from harness.memory_model.activations import LlamaShape, SavedActivations
from reference.shared.layers import LINEAR, kind_of

_PART = {
    "self_attn.q_proj": 1, "self_attn.k_proj": 1, "self_attn.v_proj": 1, "self_attn.o_proj": 2, "mlp.gate_proj": 3,
    "mlp.up_proj": 3, "mlp.down_proj": 4,
}  # fmt: skip
"""Path of a layer in a Llama's block -> number of the block's parts (norm, attention, norm, MLP) that are complete when
the layer begins."""
_NORMS = ("input_layernorm", "post_attention_layernorm")


def llama_shape(model: Any, dtype: torch.dtype) -> LlamaShape | None:
    """Return the sizes of a model with a Llama's blocks (Mistral and Qwen2 too), or None for any other model."""
    blocks = list(getattr(getattr(model, "model", None), "layers", ()))
    children = {"self_attn", "mlp", *_NORMS}
    if not blocks or any({name for name, _ in block.named_children()} != children for block in blocks):
        return None
    config, attention = model.config, blocks[0].self_attn
    plain = _PART.keys() <= {path for path, _ in blocks[0].named_modules()}
    if not plain or hasattr(attention, "q_norm") or getattr(config, "hidden_act", "") != "silu":
        return None
    return LlamaShape(
        blocks=len(blocks),
        hidden=config.hidden_size,
        mlp=config.intermediate_size,
        query=attention.q_proj.out_features,
        key=attention.k_proj.out_features,
        heads=config.num_attention_heads,
        vocabulary=config.vocab_size,
        size=dtype.itemsize,
    )


def sum_over_llama(model: Any, saved: Mapping[str, tuple[bool, int]], trains: Collection[str]) -> SavedActivations:
    """Sum up what the layers in the blocks of a Llama save for the backward pass, with a Method attached.

    saved: result of `saved_by_layers`. trains: paths of the adapted layers.
    """
    blocks = model.model.layers

    def number(part: str, *names: str) -> int:
        """Return the number of blocks in which at least one of the layers `names` saves its input.

        part: `self_attn` or `mlp`, the module of the block that contains these layers. They all have the same input.
        """
        paths = [[f"model.layers.{index}.{part}.{name}" for name in names] for index in range(len(blocks))]
        return sum(any(saved.get(path, (False, 0))[0] for path in of_block) for of_block in paths)

    norms = [getattr(block, name) for block in blocks for name in _NORMS] + [model.model.norm]
    # Find the first part (of four per block) that trains: earlier parts save nothing.
    starts = [
        4 * i + part for i in range(len(blocks)) for name, part in _PART.items() if f"model.layers.{i}.{name}" in trains
    ]
    start = 0 if model.get_input_embeddings().weight.requires_grad else min(starts, default=4 * len(blocks))
    return SavedActivations(
        blocks=len(blocks) - start // 4,
        before=start % 4,
        attention=number("self_attn", "q_proj", "k_proj", "v_proj"),
        mlp=number("mlp", "gate_proj", "up_proj"),
        down=number("mlp", "down_proj"),
        norms=sum(norm.weight.requires_grad for norm in norms),
        last=model.get_output_embeddings().weight.requires_grad,
        layers_B=sum(other_B for _, other_B in saved.values()),
    )


def saved_by_layers(layers: Mapping[str, Any], dtype: torch.dtype) -> dict[str, tuple[bool, int]]:
    """Map the path of each linear layer to whether it saves its input, and how many other bytes it saves per token."""
    known: dict[tuple[type, int, int, bool], tuple[bool, int]] = {}
    saved = {}
    for path, layer in layers.items():
        under: Any = getattr(layer, "base", layer)
        if kind_of(under) not in LINEAR:
            continue
        D, E = under.in_features, under.out_features
        same = (type(layer), D, E, under.weight.requires_grad)
        if same not in known:
            known[same] = _saved(layer, D, dtype)
        saved[path] = known[same]
    return saved


def _saved(layer: nn.Module, features: int, dtype: torch.dtype) -> tuple[bool, int]:
    """Return whether a layer saves its input for its backward pass, and how many other bytes it saves per token.

    The bytes are the difference between calls with two lengths. So a tensor whose size does not depend on the number of
    tokens, such as a decoded weight, is not counted.
    """

    def measure(tokens: int) -> tuple[bool, int]:
        x = torch.empty(tokens, features, dtype=dtype, device="meta", requires_grad=True)
        storages = saved_by(layer, x)
        return storages.pop(_storage(x), None) is not None, sum(storages.values())

    (saves_input, few), (_, more) = measure(8), measure(16)
    return saves_input, (more - few) // 8


def saved_by(layer: nn.Module, *inputs: Tensor, **named: Tensor) -> dict[int, int]:
    """Call a layer or a model, and map each storage that autograd saves for the backward pass to its size in bytes."""
    alive: list[Tensor] = []  # keeps the identities of storages unique

    def pack(t: Tensor) -> Tensor:
        alive.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(*inputs, **named)
    return {_storage(t): t.untyped_storage().nbytes() for t in alive}


def _storage(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)  # the address of its data is 0 on the meta device
