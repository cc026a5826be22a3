"""Make the corpus of adapter files: tiny bases, adapters, prompts, and the float64 logits of each base with its adapter.

    python suites/adapters/make.py             # writes the folders beside this file

The tensors are drawn from fixed seeds, and their names and ranks are written down here, not derived from a config. No
adapter library is used. The logits come from harness.conformance.adapter_files.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
PREFIX = "base_model.model."
PROMPTS = ([7], [3, 14, 1, 22, 9], [5, 28, 11, 0, 17, 2, 26, 8, 13])
VOCABULARY = 29

_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 12, "num_attention_heads": 2, "num_hidden_layers": 2}
_LLAMA = {**_SIZES, "intermediate_size": 20, "num_key_value_heads": 1, "max_position_embeddings": 32}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 12, "n_head": 2, "n_layer": 2, "n_positions": 32}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _LLAMA | {"tie_word_embeddings": False}),
    "llama-tied": ("Llama", _LLAMA | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2", _GPT2 | _TOKENS),
    # down_proj is square, and its adapter has as many ranks as experts.
    "mixtral": ("Mixtral", _LLAMA | {"intermediate_size": 12, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "bert": ("Bert", _SIZES | {"intermediate_size": 20, "max_position_embeddings": 32, "num_labels": 3}),
    # A convolution over the tokens in each block. With one head, it is not divided into groups.
    "nystromformer": (
        "Nystromformer",
        _SIZES | {"intermediate_size": 20, "max_position_embeddings": 32, "num_labels": 3, "num_attention_heads": 1,
                  "conv_kernel_size": 5, "num_landmarks": 64, "segment_means_seq_len": 64},
    ),
}  # fmt: skip
"""Name of a base -> family of the model in transformers, and the values of its config."""
_HEADS = {
    "Llama": "ForCausalLM", "Mixtral": "ForCausalLM", "GPT2": "LMHeadModel", "Bert": "ForSequenceClassification",
    "Nystromformer": "ForSequenceClassification",
}  # fmt: skip

_ATTENTION_AND_MLP = ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
_OF_GPT2 = ("c_attn", "attn.c_proj", "c_fc")


@dataclass(frozen=True)
class CorpusAdapter:
    """Description of one adapter of the corpus, the set of test files that this script writes."""

    name: str
    base: str
    targets: Iterable[str]
    """Ends of the paths of the adapted layers."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Keys of adapter_config.json, besides those that every adapter has."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """End of a path -> rank, for layers whose rank is not `r`. The first end that matches is used."""
    stacks: Mapping[str, str] = field(default_factory=dict)
    """Name of an adapted stack of experts -> text between the module's path and `.lora_A.weight` in the keys of the file."""
    saved: Iterable[str] = ()
    """Ends of the names of base parameters that the adapter's file contains besides A and B."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """End of a name in the base -> end of the key in the file, for parameters of `saved` whose name and key differ."""
    dtype: torch.dtype = torch.float32
    experts: Iterable[str] = ()
    """Names of the adapted layers of each expert, e.g. `w1`, if the file has an A and a B for each layer of each expert."""
    stack: str = "mlp.experts"
    """End of the paths of the modules whose experts have the layers in `experts`."""
    missing: Iterable[str] = ()
    """Paths of layers that the file adapts but the base does not have."""


_PATTERN = {"rank_pattern": {"q_proj": 1, "layers.1.mlp.down_proj": 6}}
_PATTERN_RANKS = {"q_proj": 1, "layers.1.mlp.down_proj": 6}
_ALPHAS = {"alpha_pattern": {"q_proj": 24, r"layers\.1\..*up_proj": 1}}
_EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "r": 2}
_STACKS = {"gate_up_proj": ".base_layer", "down_proj": ""}
_NAMES = ["w1", "w2", "w3"]
_EMBEDDING = {"embed_tokens.weight": "embed_tokens.base_layer.weight"}
_HEAD = {"lm_head.weight": "lm_head.base_layer.weight"}
_BIASES = {f"{name}.bias": f"{name}.base_layer.bias" for name in _OF_GPT2}

CORPUS = (
    CorpusAdapter("plain", "llama", _ATTENTION_AND_MLP),
    CorpusAdapter("rslora", "llama", _ATTENTION_AND_MLP, {"use_rslora": True}),
    CorpusAdapter("rank_pattern", "llama", _ATTENTION_AND_MLP, _PATTERN, _PATTERN_RANKS),
    CorpusAdapter("alpha_pattern", "llama", _ATTENTION_AND_MLP, _ALPHAS),
    # Several patterns fit layers.1.self_attn.q_proj; the first one counts.
    CorpusAdapter(
        "both_patterns", "llama", _ATTENTION_AND_MLP,
        {"rank_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 2},
         "alpha_pattern": {"layers.1.self_attn.q_proj": 12, "self_attn.q_proj": 2, "mlp.up_proj": 20}},
        {"layers.1.self_attn.q_proj": 3, "q_proj": 2},
    ),
    CorpusAdapter("rslora_patterns", "llama", _ATTENTION_AND_MLP, {"use_rslora": True, **_PATTERN, **_ALPHAS},
           _PATTERN_RANKS),
    CorpusAdapter(
        "mixed_ranks", "llama", (*_ATTENTION_AND_MLP, "k_proj", "o_proj"),
        {"r": 2, "rank_pattern": {"q_proj": 1, "k_proj": 3, "v_proj": 5, "o_proj": 8}},
        {"q_proj": 1, "k_proj": 3, "v_proj": 5, "o_proj": 8},
    ),
    CorpusAdapter("some_layers", "llama", ("layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"),
           {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    CorpusAdapter("dora", "llama", (*_ATTENTION_AND_MLP, "k_proj", "o_proj"),
           {"use_dora": True, "target_modules": "all-linear"}),
    CorpusAdapter("modules_to_save", "llama", ("q_proj",), {"modules_to_save": ["lm_head", "model.norm"]},
           saved=("lm_head.weight", "model.norm.weight")),
    CorpusAdapter("embedding", "llama", ("embed_tokens", "q_proj"), saved=("embed_tokens.weight",), keys=_EMBEDDING),
    CorpusAdapter("unmatched_keys", "llama", ("q_proj",),
           missing=("model.layers.7.self_attn.q_proj", "model.layers.0.self_attn.qkv_proj")),
    CorpusAdapter("float16", "llama", _ATTENTION_AND_MLP, dtype=torch.float16),
    CorpusAdapter("bfloat16", "llama", _ATTENTION_AND_MLP, {"use_rslora": True}, dtype=torch.bfloat16),
    CorpusAdapter("tied_head", "llama-tied", ("q_proj", "lm_head"), saved=("lm_head.weight",), keys=_HEAD),
    CorpusAdapter("tied_embedding", "llama-tied", ("q_proj", "embed_tokens"), saved=("embed_tokens.weight",),
           keys=_EMBEDDING),
    CorpusAdapter("tied_saved_head", "llama-tied", ("q_proj",), {"modules_to_save": ["lm_head"]}, saved=("lm_head.weight",)),
    CorpusAdapter("conv1d", "gpt2", _OF_GPT2, {"fan_in_fan_out": True}),
    CorpusAdapter("conv1d_dora", "gpt2", _OF_GPT2, {"fan_in_fan_out": True, "use_dora": True}),
    CorpusAdapter("bias_all", "gpt2", _OF_GPT2, {"fan_in_fan_out": True, "bias": "all"}, saved=(".bias",), keys=_BIASES),
    CorpusAdapter("bias_lora_only", "gpt2", _OF_GPT2, {"fan_in_fan_out": True, "bias": "lora_only"},
           saved=[f"{name}.bias" for name in _OF_GPT2], keys=_BIASES),
    CorpusAdapter("lora_bias", "gpt2", _OF_GPT2, {"fan_in_fan_out": True, "lora_bias": True}),
    CorpusAdapter("classifier", "bert", ("query", "value"), {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]},
           saved=("classifier.weight", "classifier.bias")),
    CorpusAdapter("experts", "mixtral", ("q_proj",), _EXPERTS | {"rank_pattern": {"experts.down_proj": 3}},
           {"experts.down_proj": 3}, stacks=_STACKS),
    CorpusAdapter("experts_rslora", "mixtral", (), _EXPERTS | {"use_rslora": True, "r": 4}, stacks=_STACKS),
    CorpusAdapter("experts_by_name", "mixtral", ("q_proj",), {"target_modules": ["q_proj", "w1", "w2", "w3"]},
           experts=_NAMES),
    CorpusAdapter("experts_by_name_rslora", "mixtral", (), {"target_modules": _NAMES, "use_rslora": True}, experts=_NAMES),
    CorpusAdapter("experts_by_name_alpha_pattern", "mixtral", (),
           {"target_modules": _NAMES, "alpha_pattern": {"w2": 24, "w3": 2}},
           experts=_NAMES),
    CorpusAdapter("experts_by_name_rank_pattern", "mixtral", (), {"target_modules": _NAMES, "rank_pattern": {"w2": 3}},
           {"w2": 3},
           experts=_NAMES),
    CorpusAdapter("experts_by_name_without_w2", "mixtral", (), {"target_modules": ["w1", "w3"]}, experts=("w1", "w3")),
    CorpusAdapter("conv2d", "nystromformer", ("query", "conv"), {"task_type": None}),
    CorpusAdapter("conv2d_dora", "nystromformer", ("query", "conv"), {"task_type": None, "use_dora": True}),
    # The numbers of the experts 0 and 2 are not in layers_to_transform, and no number of a layer but 1 is.
    CorpusAdapter("experts_by_name_some_layers", "mixtral", ("layers.1.self_attn.q_proj",),
           {"target_modules": ["q_proj", *_NAMES], "layers_to_transform": [1]}, experts=_NAMES,
           stack="layers.1.mlp.experts"),
)  # fmt: skip
"""All adapters of the corpus. Add a new adapter at the end, because the index of an adapter decides its seed."""


def main(folder: Path = HERE) -> None:
    """Write all bases and adapters into `folder`. Older ones are replaced."""
    for index, name in enumerate(BASES):
        _write_base(folder / "bases" / name, name, torch.Generator().manual_seed(100 + index))
    for index, adapter in enumerate(CORPUS):
        _write_adapter(folder, adapter, torch.Generator().manual_seed(1000 + index))


def _write_base(folder: Path, name: str, generator: torch.Generator) -> None:
    family, sizes = BASES[name]
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}{_HEADS[family]}")(config)
    with torch.no_grad():
        for own, parameter in sorted(model.named_parameters()):
            noise = _normal(generator, *parameter.shape)
            if own.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif parameter.dim() == 1:  # of a norm
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise if "emb" in own or "wte" in own else noise * 1.5 / parameter.shape[-1] ** 0.5)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def _write_adapter(root: Path, adapter: CorpusAdapter, generator: torch.Generator) -> None:
    from harness.conformance.adapter_files.adapter_file import AdapterFile
    from harness.conformance.adapter_files.reference_logits import reference_logits
    from harness.methods.base_model import load_base

    base, folder = root / "bases" / adapter.base, root / adapter.name
    config = {
        "peft_type": "LORA", "base_model_name_or_path": f"../bases/{adapter.base}", "task_type": "CAUSAL_LM", "r": 4,
        "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": list(adapter.targets), "inference_mode": True,
        **adapter.config,
    }  # fmt: skip
    tensors = _tensors(load_base(base, torch.float32), adapter, config, generator)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {key: tensor.to(adapter.dtype).contiguous() for key, tensor in tensors.items()}
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    expected = {f"prompt.{index}": torch.tensor(prompt) for index, prompt in enumerate(PROMPTS)}
    logits = reference_logits(base, AdapterFile.read(folder), PROMPTS)
    expected |= {f"logits.{index}": one.contiguous() for index, one in enumerate(logits)}
    save_file(expected, folder / "expected.safetensors")


def _tensors(
    model: torch.nn.Module, adapter: CorpusAdapter, config: Mapping[str, Any], generator: torch.Generator
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if any(path == end or path.endswith(f".{end}") for end in adapter.targets):
            rank = _rank(adapter, path, config["r"])
            found |= _of_layer(f"{PREFIX}{path}", module, rank, config, generator)
        for stack, between in adapter.stacks.items():
            weight = getattr(module, stack, None)
            if path.endswith("experts") and isinstance(weight, Tensor):
                K, E, D = weight.shape
                R, start = _rank(adapter, f"{path}.{stack}", config["r"]), f"{PREFIX}{path}{between}"
                found[f"{start}.lora_A.weight"] = _normal(generator, K * R, D) / D**0.5
                found[f"{start}.lora_B.weight"] = _normal(generator, E, R * K) / 2
        for name in adapter.experts if path.endswith(adapter.stack) else ():
            for expert in range(module.num_experts):
                start = f"{PREFIX}{path.replace('mlp', 'block_sparse_moe')}.{expert}.{name}"
                R, (D, E) = _rank(adapter, start, config["r"]), (module.hidden_dim, module.intermediate_dim)
                D, E = (E, D) if name == "w2" else (D, E)
                found[f"{start}.lora_A.weight"] = _normal(generator, R, D) / D**0.5
                found[f"{start}.lora_B.weight"] = _normal(generator, E, R) / 4
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if any(name.endswith(end) for end in adapter.saved):
            key = next((name.removesuffix(old) + new for old, new in adapter.keys.items() if name.endswith(old)), name)
            value = parameter.detach().clone()
            # peft saves the base weight of an adapted embedding or head as it is.
            changed = not key.endswith("base_layer.weight")
            found[f"{PREFIX}{key}"] = value + 0.5 * _normal(generator, *value.shape) if changed else value
    for path in adapter.missing:
        found[f"{PREFIX}{path}.lora_A.weight"] = _normal(generator, config["r"], 12)
        found[f"{PREFIX}{path}.lora_B.weight"] = _normal(generator, 12, config["r"])
    return found


def _of_layer(
    start: str, module: Any, R: int, config: Mapping[str, Any], generator: torch.Generator
) -> dict[str, Tensor]:
    stored = module.weight.detach()
    if isinstance(module, torch.nn.Embedding):
        D, E = stored.shape
        return {
            f"{start}.lora_embedding_A": _normal(generator, R, D),
            f"{start}.lora_embedding_B": _normal(generator, E, R) / 4,
        }
    if isinstance(module, torch.nn.Conv2d):
        E, D, *kernel = stored.shape
        found = {
            f"{start}.lora_A.weight": _normal(generator, R, D, *kernel) / stored[0].numel() ** 0.5,
            f"{start}.lora_B.weight": _normal(generator, E, R, 1, 1) / 4,
        }
        if config.get("use_dora"):
            norms = stored.flatten(1).norm(dim=1) * (1 + 0.3 * _normal(generator, E))
            found[f"{start}.lora_magnitude_vector"] = norms.reshape(1, E, 1, 1)
        return found
    W = stored if isinstance(module, torch.nn.Linear) else stored.T
    E, D = W.shape
    found = {
        f"{start}.lora_A.weight": _normal(generator, R, D) / D**0.5,
        f"{start}.lora_B.weight": _normal(generator, E, R) / 4,
    }
    if config.get("lora_bias"):
        found[f"{start}.lora_B.bias"] = _normal(generator, E) / 4
    if config.get("use_dora"):
        found[f"{start}.lora_magnitude_vector"] = W.norm(dim=1) * (1 + 0.3 * _normal(generator, E))
    return found


def _rank(adapter: CorpusAdapter, path: str, usual: int) -> int:
    return next((rank for end, rank in adapter.ranks.items() if path.endswith(end)), usual)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
