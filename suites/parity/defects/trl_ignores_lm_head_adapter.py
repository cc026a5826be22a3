"""trl: SFTTrainer ignores a LoRA of the output layer if the model is not a PeftModel: it never calls the layer's
forward.

The trainer multiplies the hidden states by `lm_head.weight` itself. It refuses a PeftModel with such an adapter. Any
other model trains without the adapter, and the reported loss is the loss without it. But the model's own forward, and
so its inference, uses the adapter. Seen in trl 1.16.0.
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer


class _LoraLinear(nn.Linear):
    """A linear layer with a trained low-rank update."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight
        self.a = nn.Parameter(torch.randn(4, base.in_features))
        self.b = nn.Parameter(0.5 * torch.randn(base.out_features, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x @ self.a.T @ self.b.T


torch.manual_seed(0)
sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0))
model.lm_head = _LoraLinear(model.lm_head)
for name, parameter in model.named_parameters():
    parameter.requires_grad_(name.endswith((".a", ".b", "q_proj.weight")))  # an adapter elsewhere trains too
before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
ids = torch.randint(1, 32, (1, 12))
with torch.no_grad():
    loss = float(model(input_ids=ids, labels=ids).loss)
words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>")  # noqa: S106
with tempfile.TemporaryDirectory() as folder:
    options = {
        "max_steps": 1,
        "learning_rate": 0.1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "logging_steps": 1,
    }
    trainer = SFTTrainer(
        model,
        SFTConfig(folder, **options),
        train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
        processing_class=words,
    )
    trainer.train()
print(f"loss of the model: {loss:.4f}; loss that SFTTrainer reports: {trainer.state.log_history[0]['loss']:.4f}")
for name in ("model.layers.0.self_attn.q_proj.weight", "lm_head.a", "lm_head.b"):
    moved = float((model.get_parameter(name).detach() - before[name]).abs().max())
    print(f"{name} moved by up to {moved:.3g}")
