"""Findings about one adapter file: one broken file of each kind, told by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.conformance.adapter_files import corpus
from harness.conformance.adapter_files.adapter_file import AdapterFile
from harness.conformance.adapter_files.findings import KINDS, judge
from harness.methods.base_model import empty_base

Files = tuple[dict[str, Any], dict[str, Tensor]]
Spoil = Callable[[dict[str, Any], dict[str, Tensor]], object]
Q = "base_model.model.model.layers.0.self_attn.q_proj"
NORM = "base_model.model.model.norm.weight"
HEAD = "base_model.model.lm_head.weight"


def copied(name: str, folder: Path, spoil: Spoil) -> AdapterFile:
    """Copy an adapter of the corpus, change its config and tensors, and read the copy."""
    source = AdapterFile.read(corpus.folder() / name)
    config, tensors = dict(source.config), load_file(source.weights)
    spoil(config, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return AdapterFile.read(folder)


def no_change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Leave a file as it is."""


def set_nan(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.lora_A.weight"][1, 2] = torch.nan


def set_zero(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors.update({key: 0 * tensor for key, tensor in tensors.items() if ".lora_B." in key})


def name_the_adapter(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.lora_A.default.weight"] = tensors.pop(f"{Q}.lora_A.weight")


def name_the_adapter_of_an_embedding(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if ".lora_embedding_" in key]:
        tensors[f"{key}.default"] = tensors.pop(key)


def start_anew(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Set what is zero before training: B of linear layers, and A of embeddings."""
    tensors.update({k: 0 * t for k, t in tensors.items() if ".lora_B." in k or ".lora_embedding_A" in k})


def add_rows(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    key = f"{Q}.lora_B.weight"
    tensors[key] = torch.cat([tensors[key], tensors[key]])


def add_tokens(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = torch.cat([tensors[HEAD], tensors[HEAD][:2]])


def add_embeddings(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors.update({HEAD: torch.ones(50, 12), "base_model.model.model.embed_tokens.weight": torch.ones(50, 12)})


def adapt_a_block(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config.update(target_modules=[*config["target_modules"], "mlp"])
    tensors.update({f"base_model.model.model.layers.0.mlp.lora_{half}.weight": torch.ones(4, 4) for half in "AB"})


BROKEN: list[tuple[str, str, Spoil]] = [
    ("null", "plain", lambda config, tensors: config.update(r=None)),
    ("no-target", "plain", lambda config, tensors: config.update(exclude_modules="model.*")),
    ("no-target", "plain", lambda config, tensors: config.update(target_modules=["qkv"])),
    ("no-target", "plain", lambda config, tensors: config.update(target_modules="all-linear", exclude_modules=".*")),
    ("not-compared", "plain", lambda config, tensors: config.update(target_modules=None)),
    ("empty", "plain", lambda config, tensors: tensors.clear()),
    ("prefix", "plain", lambda config, tensors: tensors.update({Q[11:]: tensors.pop(f"{Q}.lora_A.weight")})),
    ("prefix", "plain", name_the_adapter),
    ("prefix", "embedding", name_the_adapter_of_an_embedding),
    ("missing-half", "plain", lambda config, tensors: tensors.pop(f"{Q}.lora_B.weight")),
    ("rank", "plain", lambda config, tensors: config.update(r=8)),
    ("rank", "rank_pattern", lambda config, tensors: config.pop("rank_pattern")),
    (
        "dtype",
        "plain",
        lambda config, tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(4, 12, dtype=torch.int8)}),
    ),
    ("not-finite", "plain", set_nan),
    ("zero-update", "plain", set_zero),
    ("zero-update", "embedding", start_anew),
    ("scaling", "plain", lambda config, tensors: config.update(lora_alpha=0)),
    ("scaling", "plain", lambda config, tensors: config.update(alpha_pattern={"q_proj": 0})),
    ("magnitude", "dora", lambda config, tensors: config.update(use_dora=False)),
    ("magnitude", "plain", lambda config, tensors: config.update(use_dora=True)),
    ("lora-bias", "lora_bias", lambda config, tensors: config.update(lora_bias=False)),
    ("bias", "bias_all", lambda config, tensors: config.update(bias="none")),
    ("unused-pattern", "plain", lambda config, tensors: config.update(alpha_pattern={"k_proj": 16})),
    ("unknown-key", "plain", lambda config, tensors: config.update(use_dorra=True)),
    ("other-base", "conv1d", no_change),
    ("unmatched-key", "unmatched_keys", no_change),
    (
        "missing-target",
        "plain",
        lambda config, tensors: config.update(target_modules=[*config["target_modules"], "o_proj"]),
    ),
    ("missing-module", "plain", lambda config, tensors: config.update(modules_to_save=["norm"])),
    ("undeclared", "plain", lambda config, tensors: tensors.update({NORM: torch.ones(12)})),
    ("shape", "plain", add_rows),
    ("vocabulary", "modules_to_save", add_tokens),
    ("resized", "plain", add_embeddings),
    ("not-judged", "plain", adapt_a_block),
    ("unsupported", "plain", lambda config, tensors: config.update(init_lora_weights="pissa")),
]


@pytest.mark.parametrize(("kind", "name", "spoil"), BROKEN, ids=[f"{kind}-{name}" for kind, name, _ in BROKEN])
def test_each_broken_file_is_told_by_name(kind: str, name: str, spoil: Spoil, tmp_path: Path) -> None:
    found = judge(copied(name, tmp_path, spoil), empty_base(corpus.folder() / "bases" / "llama"))
    assert kind in {one.kind for one in found}
    before = judge(AdapterFile.read(corpus.folder() / name), empty_base(corpus.folder() / "bases" / "llama"))
    assert spoil is no_change or kind not in {one.kind for one in before}


def test_every_kind_has_a_broken_file() -> None:
    assert {kind for kind, _, _ in BROKEN} == set(KINDS)


@pytest.mark.parametrize("name", [name for name in corpus.names() if name != "unmatched_keys"])
def test_the_corpus_has_no_finding(name: str) -> None:
    adapter = AdapterFile.read(corpus.folder() / name)
    assert judge(adapter, empty_base(adapter.folder / adapter.config["base_model_name_or_path"])) == []
    assert judge(adapter) == []


def test_an_alpha_of_a_pattern_may_be_negative(tmp_path: Path) -> None:
    adapter = copied("plain", tmp_path, lambda config, _: config.update(alpha_pattern={"q_proj": -8}))
    assert judge(adapter, empty_base(corpus.folder() / "bases" / "llama")) == []


def test_a_key_that_the_installed_peft_ignores_is_a_note_with_the_close_name(tmp_path: Path) -> None:
    keys = {"use_dorra": True, "made_by": "another program", "of_a_later_release": None}
    found = judge(copied("plain", tmp_path, lambda config, _: config.update(keys)))
    assert [(one.kind, one.where) for one in found] == [("unknown-key", "use_dorra"), ("unknown-key", "made_by")]
    assert found[0].hint == "did you mean `use_dora`?"
    assert not any(one.nonconforming for one in found)


def test_a_shape_is_reported_with_both_shapes(tmp_path: Path) -> None:
    base = empty_base(corpus.folder() / "bases" / "llama")
    (found,) = [one for one in judge(copied("plain", tmp_path, add_rows), base) if one.kind == "shape"]
    assert found.where == f"{Q}.lora_B.weight"
    assert "(24, 4), should be (12, 4)" in found.message
    assert found.nonconforming
