"""peft: loading an adapter of Mixtral's experts from before transformers 5 converts it to stacked experts, often wrongly.

w1 and w3 become one update of twice the rank, and alpha is doubled. This is right for the scaling alpha / r. For
rsLoRA, the scaling becomes too large by the factor sqrt(2). alpha_pattern and rank_pattern keep the old names, which
match no parameter. If the adapter leaves out w2, its tensors get a name for a second wrapper that does not exist, and
are dropped. Seen in 0.21.2 with transformers 5.24.
"""

import json
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
MODEL = MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=2)

for changed in (
    {},
    {"use_rslora": True},
    {"alpha_pattern": {"w2": 64}},
    {"rank_pattern": {"w2": 3}},
    {"target_modules": ["w1", "w3"]},
):
    torch.manual_seed(0)
    base, tensors, ids = MixtralForCausalLM(MODEL).eval(), {}, torch.arange(8)[None]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["w1", "w2", "w3"], **changed}
    adapted = MixtralForCausalLM(MODEL).eval()
    adapted.load_state_dict(base.state_dict())
    experts = adapted.model.layers[0].mlp.experts
    for expert in range(2):
        gate, up = experts.gate_up_proj.data[expert].chunk(2)
        for name, W in (("w1", gate), ("w2", experts.down_proj.data[expert]), ("w3", up)):
            if name in config["target_modules"]:
                r, alpha = (config.get(f"{k}_pattern", {}).get(name, v) for k, v in (("rank", 4), ("alpha", 16)))
                A, B = torch.randn(r, W.shape[1]) / 4, torch.randn(W.shape[0], r) / 4
                key = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{name}."
                tensors |= {f"{key}lora_A.weight": A, f"{key}lora_B.weight": B}
                W += alpha / (r**0.5 if "use_rslora" in config else r) * B @ A
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, Path(folder, "adapter_model.safetensors"))
        try:
            have, want = PeftModel.from_pretrained(base, folder).eval()(ids).logits, adapted(ids).logits
            result = f"relative error of the logits {float((have - want).norm() / want.norm()):.2g}"
        except RuntimeError as error:
            result = f"raises {str(error).splitlines()[1].strip()[:90]}"
    print(f"{changed or 'plain'}: {result}")
