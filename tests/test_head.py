"""The classification head of an encoder from a folder: where it starts, and that it trains whatever the Method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel, PreTrainedModel

from harness.assets import made
from harness.training import model as models

SMALL = {"vocab_size": 60, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made.tiny_llama(folder := tmp_path_factory.mktemp("tokenizer"))
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    return folder


def saved(model: PreTrainedModel, tokenizer: Path, folder: Path) -> Path:
    """Save a model with a tokenizer of as many tokens."""
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def load(folder: Path, seed: int = 0, labels: int = 2, dtype: torch.dtype = torch.float32) -> models.Loaded:
    return models.load(folder, "encoder", labels, dtype, CPU, seed)


def modernbert() -> Any:
    return ModernBertModel(ModernBertConfig(**SMALL, **TOKENS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_of_a_new_head_starts_at_one_and_lets_gradients_through(
    dtype: torch.dtype, tokenizer: Path, tmp_path: Path
) -> None:
    loaded = load(saved(modernbert(), tokenizer, tmp_path / "mine"), dtype=dtype)
    assert [*loaded.head] == ["classifier.bias", "classifier.weight", "head.dense.weight", "head.norm.weight"]
    assert bool((loaded.head["head.norm.weight"] == 1).all())
    texts = torch.tensor([[3, 5, 28, 9], [7, 8, 9, 3]])
    logits = loaded.model(input_ids=texts).logits
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert all(bool(parameter.grad.any()) for parameter in loaded.head.values())
    assert bool(loaded.model.get_input_embeddings().weight.grad.any())


def test_a_new_linear_head_is_drawn_from_the_seed_alone(tokenizer: Path, tmp_path: Path) -> None:
    folder = saved(BertModel(BertConfig(**SMALL)), tokenizer, tmp_path / "mine")
    heads = [load(folder, seed).head for seed in (1, 1, 2)]
    # The published Records start from these numbers.
    drawn = torch.randn(2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.02
    assert torch.equal(heads[0]["classifier.weight"], drawn.float())
    assert torch.equal(heads[1]["classifier.weight"], drawn.float())
    assert not torch.equal(heads[2]["classifier.weight"], drawn.float())
    assert not heads[0]["classifier.bias"].any()
