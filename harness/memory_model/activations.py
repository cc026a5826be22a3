"""What a Llama keeps for its backward pass: an estimate by formula. No torch.

Kept per token and block, in bytes (s: bytes of a number in the model's dtype; D, F, Q, K: features of the residual stream,
of the MLP, of all queries, of all keys; H heads), read off what autograd saves in transformers' Llama:

    2 norms        2 (4 D + 4)            each its input in float32, and the inverse root
    attention      s (2 Q + 2 K) + 4 H    q, k, v, output, a logarithm a head: by a kernel that keeps no T x T matrix
    MLP            3 s F                  gate, silu(gate), up

and where a Method needs them: each norm's output (s D) where a layer that reads it keeps its input, the MLP's product
(s F) likewise, each norm's normalised input (s D) where its weight trains, and what the adapted layers themselves keep,
which is not by formula: each is called on the meta device (`harness.memory_model.counting`). Beside the blocks: the last norm;
and of the logits themselves, their logarithms and the gradient of these, V (s + 2 max(s, 4)).

Blocks before the first layer that trains keep nothing. With gradient checkpointing each block keeps its input alone, s D,
and one block at a time is computed again. Not counted: the sines and cosines of positions, which all blocks share.

The same count for GPT-2's block in 16 bits is 34 D without the attention's matrix: Korthikanti et al. 2022,
arXiv:2205.05198, eq. 1.
"""

from __future__ import annotations

from dataclasses import dataclass

_WIDE = 4
"""Bytes of float32, in which a Llama normalises whatever its dtype, and in which a loss is taken at least."""


@dataclass(frozen=True)
class LlamaShape:
    """Features of a Llama. query, key: of all heads together. size: bytes of a number in the model's dtype."""

    blocks: int
    hidden: int
    mlp: int
    query: int
    key: int
    heads: int
    vocabulary: int
    size: int


@dataclass(frozen=True)
class SavedActivations:
    """What the layers of one Method keep.

    blocks: those that a gradient reaches: not those before the first layer that trains. before: how many of the four parts
    of the first of them (norm, attention, norm, MLP) come before that layer. attention, mlp, down: blocks whose q, k or v,
    whose gate or up, whose down keep their input. norms: norms whose weight trains. last: whether the output layer keeps its
    input. layers_B: bytes a token that adapted layers keep beside their inputs.
    """

    blocks: int
    before: int
    attention: int
    mlp: int
    down: int
    norms: int
    last: bool
    layers_B: int


def bytes_per_token(shape: LlamaShape, kept: SavedActivations, checkpointing: bool = False) -> int:
    """Return the bytes kept for each token of a batch, logits not counted."""
    s, norm = shape.size, _WIDE * shape.hidden + _WIDE
    parts = (norm, s * 2 * (shape.query + shape.key) + _WIDE * shape.heads, norm, s * 3 * shape.mlp)
    inputs = s * (shape.hidden * (kept.attention + kept.mlp + kept.norms) + shape.mlp * kept.down)
    end = norm + s * shape.hidden * kept.last
    blocks = kept.blocks * sum(parts) - sum(parts[: kept.before]) + inputs + kept.layers_B
    if checkpointing:
        return shape.blocks * s * shape.hidden + -(-blocks // max(1, kept.blocks)) + end
    return blocks + end


def logit_bytes_per_token(shape: LlamaShape) -> int:
    """Return the bytes of logits, their logarithms and the gradient of these for each token that the loss is taken of."""
    return shape.vocabulary * (shape.size + 2 * max(shape.size, _WIDE))
