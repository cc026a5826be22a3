"""peft: if a VeRA target has 16 bits, A and B are rounded for every layer, float32 layers included.

All layers share one A and one B. Attaching to a layer casts both to the dtype of the layer, and attaching to the next layer
casts them back, so they keep the rounding errors. A file that holds only b and d (`save_projection=False`) then computes
something else in a model whose layers all have 32 bits. Seen in 0.21.2.
"""

import torch
from peft import VeraConfig, get_peft_model
from torch import nn


def attached(first):
    """Return the second layer, in float32, of a model whose first layer has the dtype `first`."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6).to(first), nn.Linear(6, 6))
    model = get_peft_model(base, VeraConfig(r=3, target_modules=["0", "1"], projection_prng_key=7))
    layer = model.base_model.model[1]
    with torch.no_grad():
        layer.vera_lambda_b["default"].fill_(1)
    return layer


x = torch.ones(1, 6)
right, wrong = attached(torch.float32), attached(torch.bfloat16)
for name, layer in (("float32", right), ("bfloat16", wrong)):
    A = layer.vera_A["default"]
    print(f"first layer in {name}: A in {A.dtype}, begins with {A.flatten()[:3].tolist()}")
off = (wrong(x) - right(x)).norm() / (right(x) - right.base_layer(x)).norm()
print(f"the update of the float32 layer is off by {float(off):.2g} (should be 0)")
