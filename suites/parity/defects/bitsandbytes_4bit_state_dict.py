"""bitsandbytes: a Linear4bit cannot load the state_dict that it saved.

It saves the constants of its weight beside the weight (weight.absmax, weight.quant_map, ...), but no code loads them,
so load_state_dict raises because of unexpected keys. With strict=False the layer loads the codes but keeps its own
constants, so it gets another weight. Only Params4bit.from_prequantized, which transformers calls, reads saved
constants. Seen in 0.50.2.
"""

import bitsandbytes
import torch

torch.manual_seed(0)
layers = [
    bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    for _ in range(2)
]
with torch.no_grad():
    saved = layers[0].state_dict()
    for name, layer in (("itself", layers[0]), ("another layer", layers[1])):
        try:
            layer.load_state_dict(saved)
        except RuntimeError as error:
            print(f"into {name}: {' '.join(str(error).split())}")
    layers[1].load_state_dict(saved, strict=False)
    x = torch.randn(4, 64)
    first, second = (layer.train()(x) for layer in layers)
    print(f"with strict=False the outputs differ by {float((first - second).norm() / first.norm()):.2g} (relative)")
