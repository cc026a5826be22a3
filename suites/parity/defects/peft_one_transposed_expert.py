"""peft adds the update of a single transposed expert without transposing it: the call raises, or a square weight is wrong.

With several experts, `ParamWrapper.get_delta_weight` swaps the sides if the module says `is_transposed`. With one expert it
takes the path of a linear layer, whose update is (outputs, inputs). Seen in 0.21.2.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


class Experts(nn.Module):
    """Stacked experts, of which the first one is called."""

    is_transposed = True  # the weights are (experts, inputs, outputs)

    def __init__(self, number: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(number, inputs, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x times the weight of the first expert."""
        return x @ self.weight[0]


for number, sides in ((2, (6, 4)), (1, (4, 4)), (1, (6, 4))):
    torch.manual_seed(0)
    model = nn.Sequential(Experts(number, *sides))
    config = LoraConfig(r=2, target_parameters=["0.weight"], init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    adapter = wrapped.base_model.model[0]
    A, B = adapter.lora_A["default"].weight[:2], adapter.lora_B["default"].weight[:, ::number]
    x = torch.randn(3, sides[0])
    right = x @ adapter.get_base_layer().weight[0] + adapter.scaling["default"] * (x @ A.T @ B.T)
    try:
        print(number, "experts of", sides, "error:", float((wrapped(x) - right).abs().max().detach()))
    except RuntimeError as error:
        print(number, "experts of", sides, "raised:", error)
