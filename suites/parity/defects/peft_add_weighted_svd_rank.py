"""peft: with an svd_rank above a side of a layer, `add_weighted_adapter` makes factors that do not fit, or raises.

The decomposition of a (6, 12) update has 6 values. The new B gets 6 columns, but A gets 12 rows, because it is cut from the
full matrix. The forward pass then raises. For a (20, 12) update the call itself raises. A layer with few outputs, such
as v_proj with grouped heads, is enough; the other layers may need this rank. Here on 0.21.2.
"""

from peft import LoraConfig, get_peft_model
from torch import nn, randn

for shape in ((12, 6), (12, 20)):
    config = LoraConfig(r=7, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(*shape)), config)
    model.add_adapter("other", config)
    try:
        model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "sum", "svd", svd_rank=14)
        model.set_adapter("sum")
        model(randn(1, 12))
        print(f"Linear{shape}: works")
    except RuntimeError as error:
        print(f"Linear{shape}: raised {error}")
