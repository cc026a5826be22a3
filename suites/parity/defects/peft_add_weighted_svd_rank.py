"""peft: if svd_rank exceeds the smaller side of a layer, `add_weighted_adapter` makes factors that do not fit, or raises.

The decomposition of a (6, 12) update has 6 values. The new B gets 6 columns, but A gets 12 rows, because it is cut from the
full matrix. The forward pass then raises. For a (20, 12) update, or for a convolution, the call itself raises. A layer with
few outputs, such as v_proj with grouped heads, is enough; the other layers may need this rank. Seen in 0.21.2.
"""

from peft import LoraConfig, get_peft_model
from torch import nn, randn

for layer, inputs in (
    (nn.Linear(12, 6), randn(1, 12)),
    (nn.Linear(12, 20), randn(1, 12)),
    (nn.Conv2d(3, 6, 3), randn(1, 3, 9, 9)),
):
    config = LoraConfig(r=7, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(layer), config)
    model.add_adapter("other", config)
    try:
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum", "svd", svd_rank=14)
        model.set_adapter("sum")
        model(inputs)
        print(f"{layer}: works")
    except RuntimeError as error:
        print(f"{layer}: raised {error}")
