"""Estimate the activations that a Llama saves for its backward pass, in closed form. Imports no torch.

The estimate counts the bytes that autograd saves in transformers' Llama. Each block saves, per token:

    2 norms        2 (4 D + 4)            each norm saves its input and an inverse root, both in float32
    attention      s (2 Q + 2 K) + 4 H    q, k, v, the output, and a log-sum-exp per head; no T x T matrix
    MLP            3 s F                  gate, silu(gate), up

The symbols are:

    s    bytes of a number in the model's dtype
    D    features of the residual stream
    F    features inside the MLP
    Q    features of all query heads together
    K    features of all key heads together
    H    number of heads
    T    number of tokens
    V    size of the vocabulary

A Method may add:

    s D    for a norm's output, if an adapted layer saves this output
    s F    for the MLP's product, if an adapted layer saves this product
    s D    for a norm's normalised input, if the norm's weight trains

Adapted layers save further tensors, which `harness.memory_model.saved_activations` measures. Outside the blocks, the
last norm saves its input. For each token with a loss, the logits, their log-softmax and the gradient of the log-softmax
take V (s + 2 max(s, 4)) bytes.

Blocks before the first trained layer save nothing. With gradient checkpointing, each block saves only its input, s D,
and one block at a time is recomputed. The sines and cosines of positions, which all blocks share, are not counted.

For a block of GPT-2 in 16 bits, this way of counting gives 34 D bytes per token without the attention's matrix. This
agrees with eq. 1 of Korthikanti et al. 2022, arXiv:2205.05198.
"""

from __future__ import annotations

from dataclasses import dataclass

_WIDE = 4
"""Bytes of a number in float32. A Llama computes its norms in float32, and its loss in float32 or a wider dtype."""


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama."""

    blocks: int
    hidden: int
    """Number of features of the residual stream."""
    mlp: int
    """Number of features inside the MLP."""
    query: int
    """Number of features of all query heads together."""
    key: int
    """Number of features of all key heads together."""
    heads: int
    vocabulary: int
    size: int
    """Bytes of a number in the model's dtype."""


@dataclass(frozen=True)
class SavedActivations:
    """Counts that decide how many bytes a Llama with one Method saves for the backward pass."""

    blocks: int
    """Number of blocks that a gradient reaches: the block with the first trained layer, and all later blocks."""
    before: int
    """Number of parts (norm, attention, norm, MLP) that precede the first trained layer in its block."""
    attention: int
    """Number of blocks in which q, k or v saves its input."""
    mlp: int
    """Number of blocks in which gate or up saves its input."""
    down: int
    """Number of blocks in which down saves its input."""
    norms: int
    """Number of norms with a trainable weight."""
    last: bool
    """True if the output layer saves its input."""
    layers_B: int
    """Bytes per token that adapted layers save in addition to their inputs."""


def bytes_per_token(shape: LlamaShape, saved: SavedActivations, checkpointing: bool = False) -> int:
    """Return the number of bytes that a Llama saves for each token of a batch. Logits are not counted."""
    s, norm = shape.size, _WIDE * shape.hidden + _WIDE
    parts = (norm, s * 2 * (shape.query + shape.key) + _WIDE * shape.heads, norm, s * 3 * shape.mlp)
    inputs = s * (shape.hidden * (saved.attention + saved.mlp + saved.norms) + shape.mlp * saved.down)
    end = norm + s * shape.hidden * saved.last
    blocks = saved.blocks * sum(parts) - sum(parts[: saved.before]) + inputs + saved.layers_B
    if checkpointing:
        return shape.blocks * s * shape.hidden + -(-blocks // max(1, saved.blocks)) + end
    return blocks + end


def logit_bytes_per_token(shape: LlamaShape) -> int:
    """Return the bytes that the output layer and the loss need for each token with a loss.

    These are the bytes of the token's logits, of their log-softmax, and of the gradient of the log-softmax.
    """
    return shape.vocabulary * (shape.size + 2 * max(shape.size, _WIDE))
