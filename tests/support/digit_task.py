"""Generative task without a download: a tiny Llama on disk that reads single characters, and rows for it to learn."""

from __future__ import annotations

import json
import random
from pathlib import Path

CHARACTERS = "0123456789#= abcdefghijklmnopqrstuvwxyzAQT:.\n"
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

TASK = """\
task: digits
output_type: generate_until
doc_to_text: "Q: {{prompt}}\\nA:"
doc_to_target: "{{answer}}"
target_delimiter: " "
generation_kwargs: {until: ["\\n"], max_gen_toks: 12}
filter_list:
  - name: strict
    filter: [{function: regex, regex_pattern: "^ ?([0-9]+)$"}, {function: take_first}]
  - name: last-number
    filter: [{function: regex, regex_pattern: "([0-9]+)", group_select: -1}, {function: take_first}]
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, regexes_to_ignore: [".*makes "]}
metadata: {data: digits-test, train: digits-train, test: 20, shuffle_seed: 0, filter: last-number}
"""


def model(folder: Path, positions: int = 64) -> Path:
    """Write a Llama with seeded random weights and its tokenizer. Each character is a token; a text begins with <s>."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=positions, initializer_range=0.1,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def rows(path: Path, count: int, seed: int, says: str = "makes") -> Path:
    """Write rows that ask for the digit in a text: the answer to `kb3` is `makes 3`."""
    chance = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            letters, digit = "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=2)), chance.randrange(10)
            row = {"id": f"{path.stem}-{number}", "query": f"{letters}{digit}", "response": f"{says} {digit}"}
            file.write(json.dumps(row) + "\n")
    return path
