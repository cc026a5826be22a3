"""axolotl: the kernel for embeddings ignores `embed_scale`, by which Gemma multiplies what it looks up.

`apply_lora_embedding`, which replaces the forward pass of peft's layer, calls F.embedding on the weight instead of the
base layer, and scales the adapter's part no more than that. So the whole output is too small. Seen in 0.19.0.
"""

import torch
from axolotl.kernels.lora import apply_lora_embedding
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

torch.manual_seed(0)
tokens = torch.arange(9)
embedding = Gemma3TextScaledWordEmbedding(9, 4, padding_idx=0, embed_scale=4.0)
settings = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
layer = get_peft_model(nn.Sequential(embedding), settings).base_model.model[0]
have, want = apply_lora_embedding(layer, tokens).detach(), layer(tokens).detach()
print(f"with embed_scale=4, the output is {float(have.norm() / want.norm()):.3g} times as large as peft's")
