"""bitsandbytes: quantising a tensor that needs a gradient records a graph in the constants, which keeps the tensor alive.

The codes have no gradient, so nothing can use this graph. As long as the QuantState exists, the memory of the unpacked
weight is not freed, and copy.deepcopy refuses the absmax. Params4bit quantises `data` and is not affected. Seen in 0.50.2.
"""

import copy
import weakref

import torch
from bitsandbytes import functional


def quantised(quantise, recorded, **options):
    """Quantise a parameter. Return its QuantState, and a weak reference to the parameter."""
    weight = torch.nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    with torch.set_grad_enabled(recorded):
        return quantise(weight, **options)[1], weakref.ref(weight)


for name, quantise, options in (
    ("nf4", functional.quantize_4bit, {"quant_type": "nf4"}),
    ("fp4", functional.quantize_4bit, {"quant_type": "fp4"}),
    ("8 bits", functional.quantize_blockwise, {"blocksize": 64}),
):
    for recorded in (False, True):
        state, weight = quantised(quantise, recorded, **options)
        try:
            copy.deepcopy(state.absmax)
            copied = "can be copied"
        except RuntimeError:
            copied = "cannot be copied"
        graph = "no graph" if state.absmax.grad_fn is None else "a graph"
        kept = "freed" if weight() is None else "kept"
        mode = "by default" if recorded else "under no_grad"
        print(f"{name}, {mode}: absmax has {graph} and {copied}, the weight is {kept}")
