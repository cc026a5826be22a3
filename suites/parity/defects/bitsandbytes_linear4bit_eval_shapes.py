"""On CPUs with AVX512-BF16, bitsandbytes' Linear4bit in eval mode raises for many sizes of its weight.

_convert_weight_packed_for_cpu repacks the weight. It asserts that out_features is a multiple of 32, and its reshape
requires that each row of the weight consists of whole blocks. In training the same layer works. Seen in 0.50.2.
"""

import bitsandbytes
import torch

print("AVX512-BF16:", bool(bitsandbytes.functional.has_avx512bf16()))
for D, E in ((128, 64), (128, 48), (96, 160), (65, 63)):
    layer = bitsandbytes.nn.Linear4bit(D, E, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    told = [f"{D} -> {E}: training"]
    told.append(str(tuple(layer.train()(torch.ones(2, D, requires_grad=True)).shape)))
    try:
        told.append(f"eval {tuple(layer.eval()(torch.ones(2, D)).shape)}")
    except (AssertionError, RuntimeError) as error:
        told.append(f"eval {type(error).__name__}: {error}")
    print(*told)
