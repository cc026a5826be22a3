"""Train by trl's SFTTrainer, as a user does: `python sft_training.py BASE ROWS FOLDER`. Nothing of the harness is imported.

BASE: folder of a causal model. ROWS: a file with one JSON object {text, label} per line. FOLDER receives what SFTTrainer
saves: the adapter, its checkpoints 20 and 40, and the log.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

base, rows, folder = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
texts: dict[str, list[list[int]]] = {"input_ids": [], "completion_mask": []}
for line in Path(rows).read_text(encoding="utf-8").splitlines():
    row = json.loads(line)
    ids = tokenizer(f"{row['text']} = {('bad', 'good')[row['label']]}")["input_ids"]
    texts["input_ids"].append(ids)
    texts["completion_mask"].append([0] * (len(ids) - 1) + [1])
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(base),
    args=SFTConfig(
        folder, max_steps=40, per_device_train_batch_size=8, learning_rate=5e-3, max_grad_norm=0.0, bf16=False, use_cpu=True,
        completion_only_loss=True, logging_steps=10, save_steps=20, report_to="none", disable_tqdm=True,
    ),
    train_dataset=datasets.Dataset.from_dict(texts),
    processing_class=tokenizer,
    peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
)  # fmt: skip
trainer.train()
trainer.save_model()
trainer.save_state()
