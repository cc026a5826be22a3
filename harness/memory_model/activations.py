"""Closed-form estimate of the activations that a Llama saves for its backward pass. No torch.

Saved per token and block, in bytes (s: bytes of a number in the model's dtype; D, F, Q, K: features of the residual stream,
of the MLP, of all queries, of all keys; H heads), as autograd saves in transformers' Llama:

    2 norms        2 (4 D + 4)            each its input in float32, and the inverse root
    attention      s (2 Q + 2 K) + 4 H    q, k, v, output, a logarithm per head: by a kernel without a T x T matrix
    MLP            3 s F                  gate, silu(gate), up

Depending on the Method also: a norm's output (s D) if a layer saves it as its input, the MLP's product (s F) likewise, a
norm's normalised input (s D) if its weight trains, and the tensors of the adapted layers themselves, measured by a call on
the meta device (`harness.memory_model.counting`). Outside the blocks: the last norm, and for the logits, their logarithms
and the gradient of these V (s + 2 max(s, 4)).

Blocks before the first layer that trains save nothing. With gradient checkpointing each block saves only its input, s D, and
one block at a time is recomputed. Not counted: the sines and cosines of positions, shared by all blocks.

The same count for GPT-2's block in 16 bits is 34 D without the attention's matrix: Korthikanti et al. 2022,
arXiv:2205.05198, eq. 1.
"""

from __future__ import annotations

from dataclasses import dataclass

_WIDE = 4
"""Bytes of a float32. A Llama's norms compute in float32, and a loss in float32 or wider."""


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a Llama."""

    blocks: int
    hidden: int
    """Features of the residual stream."""
    mlp: int
    """Features inside the MLP."""
    query: int
    """Features of all query heads."""
    key: int
    """Features of all key heads."""
    heads: int
    vocabulary: int
    size: int
    """Bytes of a number in the model's dtype."""


@dataclass(frozen=True)
class SavedActivations:
    """Activations that the layers of one Method save."""

    blocks: int
    """Number of blocks that a gradient reaches: the block with the first trained layer, and all later blocks."""
    before: int
    """Number of parts (norm, attention, norm, MLP) before the first trained layer in its block."""
    attention: int
    """Number of blocks in which q, k or v saves its input."""
    mlp: int
    """Number of blocks in which gate or up saves its input."""
    down: int
    """Number of blocks in which down saves its input."""
    norms: int
    """Number of norms with a trainable weight."""
    last: bool
    """Whether the output layer saves its input."""
    layers_B: int
    """Bytes per token that adapted layers save in addition to their inputs."""


def bytes_per_token(shape: LlamaShape, saved: SavedActivations, checkpointing: bool = False) -> int:
    """Return the bytes saved per token of a batch, without logits."""
    s, norm = shape.size, _WIDE * shape.hidden + _WIDE
    parts = (norm, s * 2 * (shape.query + shape.key) + _WIDE * shape.heads, norm, s * 3 * shape.mlp)
    inputs = s * (shape.hidden * (saved.attention + saved.mlp + saved.norms) + shape.mlp * saved.down)
    end = norm + s * shape.hidden * saved.last
    blocks = saved.blocks * sum(parts) - sum(parts[: saved.before]) + inputs + saved.layers_B
    if checkpointing:
        return shape.blocks * s * shape.hidden + -(-blocks // max(1, saved.blocks)) + end
    return blocks + end


def logit_bytes_per_token(shape: LlamaShape) -> int:
    """Return the bytes per token with a loss: its logits, their logarithms, and the gradient of the logarithms."""
    return shape.vocabulary * (shape.size + 2 * max(shape.size, _WIDE))
