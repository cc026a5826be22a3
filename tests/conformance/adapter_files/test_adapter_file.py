"""Reading an adapter: what is refused, and with which message."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness.conformance.adapter_files import corpus
from harness.conformance.adapter_files.adapter_file import AdapterFile
from harness.conformance.adapter_files.reference_logits import reference_logits
from harness.errors import Unsupported, UsageError


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Return a copy of the plain adapter of the corpus."""
    return Path(shutil.copytree(corpus.folder() / "plain", tmp_path / "plain"))


def test_a_folder_and_its_file_are_the_same_adapter(plain: Path) -> None:
    assert AdapterFile.read(plain) == AdapterFile.read(plain / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        (json.dumps({"peft_type": "IA3"}), "unknown type of adapter: peft_type is 'IA3'"),
        (json.dumps({}), "unknown type of adapter: peft_type is None"),
        (json.dumps({"peft_type": "LORA", "r": "four"}), "r is 'four'"),
        (json.dumps({"peft_type": "LORA", "r": 0}), "r is 0"),
        (json.dumps({"peft_type": "LORA", "rank_pattern": {"q_proj": "4"}}), "rank_pattern: 'q_proj' is '4'"),
        (json.dumps({"peft_type": "LORA", "rank_pattern": {"q_proj": 2.5}}), "rank_pattern: 'q_proj' is 2.5"),
        ("[" * 100_000, "too many nested brackets"),
        (json.dumps({"peft_type": "LORA", "r": 10**4000}), "r is 4001 digits"),
        (json.dumps({"peft_type": "LORA", "lora_alpha": 10**400}), "lora_alpha is 401 digits"),
        (json.dumps({"peft_type": "LORA", "lora_alpha": float("nan")}), "lora_alpha is nan"),
        (json.dumps({"peft_type": "LORA", "bias": "some"}), "bias is 'some'"),
        (json.dumps({"peft_type": "LORA", "task_type": "CHAT"}), "task_type is 'CHAT'"),
        (json.dumps({"peft_type": "LORA", "auto_mapping": "x"}), "auto_mapping is 'x'"),
        (json.dumps({"peft_type": "LORA", "target_modules": ["q_proj", 1]}), "target_modules has the element 1"),
        (json.dumps({"peft_type": "LORA", "target_modules": "*q_proj"}), "target_modules: '*q_proj' is not a regular"),
        (json.dumps({"peft_type": "LORA", "exclude_modules": "(q"}), "exclude_modules: '(q' is not a regular"),
        (json.dumps({"peft_type": "LORA", "rank_pattern": {"q[": 2}}), "rank_pattern: 'q[' is not a regular"),
        (json.dumps({"peft_type": "LORA", "alpha_pattern": {"*q": 2}}), "alpha_pattern: '*q' is not a regular"),
        (json.dumps({"peft_type": "LORA", "layers_pattern": ["h", "("]}), "layers_pattern: '(' is not a regular"),
        (json.dumps({"peft_type": "LORA", "modules_to_save": ["+"]}), "modules_to_save: '+' is not a regular"),
        (
            json.dumps({"peft_type": "LORA", "rank_pattern": {"(?i)Q": 4}}),
            "rank_pattern: '(?i)Q' is not a regular expression inside",
        ),
        (json.dumps({"peft_type": "LORA", "modules_to_save": ["(?i)q"]}), "'(?i)q' is not a regular expression inside"),
        (json.dumps({"peft_type": "LORA", "layers_pattern": "(?i)h"}), "'(?i)h' is not a regular expression inside"),
        (json.dumps({"peft_type": "LORA", "layers_pattern": "(?P<idx>h)"}), "is not a regular expression inside"),
        (json.dumps({"peft_type": "LORA", "alpha_pattern": {"q": float("inf")}}), "alpha_pattern: 'q' is inf"),
    ],
)
def test_a_wrong_config_is_one_message_with_a_hint(plain: Path, content: str, says: str) -> None:
    (plain / "adapter_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        AdapterFile.read(plain)
    assert says in caught.value.what
    assert caught.value.where.endswith("adapter_config.json")
    assert caught.value.hint


def test_a_file_that_is_no_safetensors_is_refused(plain: Path) -> None:
    (plain / "adapter_model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(UsageError, match="is not a safetensors file"):
        AdapterFile.read(plain)


@pytest.mark.parametrize(
    ("program", "file", "key"),
    [
        ("diffusers", "pytorch_lora_weights.safetensors", "unet.mid_block.attn.to_q.lora_A.weight"),
        ("diffusers", "pytorch_lora_weights.safetensors", "transformer.blocks.0.attn.to_q.lora.down.weight"),
        ("kohya", "style.safetensors", "lora_unet_mid_block_attn_to_q.lora_down.weight"),
        ("ComfyUI", "style.safetensors", "diffusion_model.blocks.0.q.lora_A.weight"),
        ("mlx-lm", "adapters.safetensors", "model.layers.0.self_attn.q_proj.lora_a"),
    ],
)
def test_a_file_of_another_program_is_told_by_name(program: str, file: str, key: str, tmp_path: Path) -> None:
    save_file({key: torch.ones(4, 12)}, tmp_path / file)
    if program == "mlx-lm":
        config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 20.0}}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in (tmp_path / file, *([tmp_path] if program in ("diffusers", "mlx-lm") else [])):
        with pytest.raises(UsageError, match=rf"this is a {program}.*not judged"):
            AdapterFile.read(path)


def test_a_peft_file_of_gpt2_without_its_prefix_is_no_file_of_another_program(plain: Path) -> None:
    save_file({"transformer.h.0.attn.c_attn.lora_A.weight": torch.ones(4, 12)}, plain / "adapter_model.safetensors")
    assert AdapterFile.read(plain).config["peft_type"] == "LORA"


def test_the_hint_names_adapters_in_folders_below(plain: Path) -> None:
    with pytest.raises(UsageError) as caught:
        AdapterFile.read(plain.parent)
    assert "plain" in caught.value.hint


def test_a_file_without_the_right_to_read_it_is_not_called_missing(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UsageError, match=r"cannot be read \(Permission denied\)"):
        AdapterFile.read(plain)


def test_a_pickle_is_never_read(plain: Path) -> None:
    (plain / "adapter_model.safetensors").rename(plain / "adapter_model.bin")
    with pytest.raises(UsageError, match="is a pickle, which may run code"):
        AdapterFile.read(plain)


def test_an_adapter_of_another_base_is_refused() -> None:
    adapter = AdapterFile.read(corpus.folder() / "plain")
    with pytest.raises(UsageError, match="no tensor has a place in the base"):
        reference_logits(corpus.folder() / "bases" / "gpt2", adapter, [[1]])
    with pytest.raises(UsageError, match=r"has the shape \(4, 24\), expected \(4, 12\)"):
        reference_logits(corpus.folder() / "bases" / "llama", _wider(adapter), [[1]])


def _wider(adapter: AdapterFile) -> AdapterFile:
    class Wider(AdapterFile):
        def tensors(self) -> dict[str, torch.Tensor]:
            return {key: t.repeat(1, 2) if ".lora_A." in key else t for key, t in super().tensors().items()}

    return Wider(adapter.weights, adapter.config, adapter.header)


def test_a_config_that_the_reference_does_not_implement_is_unsupported(plain: Path) -> None:
    config = json.loads((plain / "adapter_config.json").read_text(encoding="utf-8"))
    (plain / "adapter_config.json").write_text(json.dumps({**config, "use_qalora": True}), encoding="utf-8")
    with pytest.raises(Unsupported, match="use_qalora"):
        reference_logits(corpus.folder() / "bases" / "llama", AdapterFile.read(plain), [[1]])


def test_logits_in_float64_are_not_rounded_to_float32() -> None:
    base = corpus.folder() / "bases" / "llama"
    (logits,) = reference_logits(base, None, [[5, 6, 7]])
    assert logits.dtype is torch.float64
    assert not torch.equal(logits, logits.float().double())
    (alone,) = reference_logits(base, None, [[5, 6]])  # a causal model: earlier logits do not depend on later tokens
    assert float((alone - logits[:2]).abs().max()) < float(torch.finfo(torch.float32).eps) ** 1.5
