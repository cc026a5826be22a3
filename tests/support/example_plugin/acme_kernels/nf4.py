"""Decoder of NF4 that does not depend on peft-harness. Its table maps a byte to two levels."""

import torch

# The levels that the authors of QLoRA published, in the order of the codes.
LEVELS = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def decode(packed, absmax, block, shape, dtype):
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=packed.device)
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
    flat = pairs[packed.flatten().long()].flatten()[: torch.Size(shape).numel()]
    scales = absmax.repeat_interleave(block)[: flat.numel()]
    return (flat * scales).reshape(tuple(shape)).to(dtype)
