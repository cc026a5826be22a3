"""The prediction of memory, against the ledgers of Cells that ran and against what autograd saves."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch

from harness.assets import structure
from harness.cell import base_quantisation
from harness.cell.measure.memory import model_tensors, optimizer_tensors, tensor_bytes
from harness.cell.training import optimizers
from harness.cell.training.offloaded_weights import release, unused
from harness.conformance.subject import DTYPES, adaptable_layers, configure
from harness.conformance.tolerance_constants import FOOTPRINT_ACTIVATIONS, FOOTPRINT_LEDGER
from harness.memory_model import counting, saved_activations
from harness.memory_model.ledger import OPTIMIZERS, OWN, PARTS
from harness.methods.registry import discover
from harness.methods.spec import methods
from harness.records import store
from harness.records.record import Base, Record, Training
from reference.operations.paged import Paged
from support import small_llama
from support.repository import PUBLISHED, TOP
from support.small_llama import METHODS, SMALL, llama, off, predicted

# What config.json of the two models says; their weights need not be here.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "minilm-l6": (
        "encoder",
        {
            "model_type": "bert", "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6,
            "num_attention_heads": 12, "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2,
        },
    ),
    "smollm2-135m-instruct": (
        "causal",
        {
            "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "head_dim": 64,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
            "max_position_embeddings": 8192,
        },
    ),
}  # fmt: skip


def records() -> list[Record]:
    found = [store.read_record(path) for path in sorted((PUBLISHED / "2026-11-24-quick-cpu" / "cells").glob("*.json"))]
    return [record for record in found if record.measurements is not None]


def attached(method: str, dtype: str, implementation: str = "reference", base: str = "none") -> tuple[Any, Any]:
    """Return a small Llama with a Method attached, and what attaching returned; weights are real."""
    model, config = llama(dtype), configure(method, METHODS[method])
    if base != "none":
        paths = list(adaptable_layers(model, config))
        of = Base(quantization=base, implementation="bitsandbytes")  # type: ignore[arg-type]
        base_quantisation.pack(model, paths, of, DTYPES[dtype], discover())
    bases = adaptable_layers(model, config)
    adapted = discover().find("method", method, implementation)(model, config, torch.Generator().manual_seed(0))
    release(unused(method, adapted, bases))  # as a Cell does before it trains
    return model, adapted


def stepped(model: Any, adapted: Any, optimizer: Any) -> None:
    """Take one training step."""
    ids = torch.arange(32)[None]
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    term = adapted.regularizer()
    (loss if term is None else loss + term).backward()
    optimizer.step()


@pytest.mark.parametrize("record", records(), ids=lambda r: r.cell.label)
def test_the_ledger_of_a_published_record(record: Record) -> None:
    cell, measured = record.cell, record.measurements
    assert measured is not None
    kind, config = CONFIGS[cell.model]
    (one,) = counting.count(config, kind, cell.dtype, {cell.method: [cell.config]}, [])["methods"][cell.method]
    assert one["trainable"] == measured.parameters.trainable
    ledger = measured.memory
    trained = cell.training.steps > 0
    assert off(one["weights"][cell.base.quantization], ledger.weights_B) <= FOOTPRINT_LEDGER
    assert off(one["adapter"], ledger.adapter_B) <= FOOTPRINT_LEDGER
    assert off(one["gradients"] if trained else 0, ledger.gradients_B) <= FOOTPRINT_LEDGER
    assert off(one["optimizer"]["adamw"][0] if trained else 0, ledger.optimizer_B) <= FOOTPRINT_LEDGER


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", METHODS)
def test_the_ledger_of_a_small_llama(method: str, dtype: str) -> None:
    model, adapted = attached(method, dtype)
    own = {id(p) for p in llama(dtype).parameters()} | {
        id(p) for p in model.parameters() if not any(p is t for t in adapted.tensors().values())
    }
    optimizer, _ = optimizers.make(adapted, [], Training(steps=1))
    stepped(model, adapted, optimizer)
    whole = method in ("full", "galore")
    added = [] if whole else [t for t in adapted.tensors().values() if id(t) not in own]
    weights = [t for t in model_tensors(model) if not any(t is a for a in added)]
    one = predicted(method, dtype)
    (device, host), *_ = one["optimizer"].values()
    assert one["trainable"] == sum(p.numel() for p in adapted.parameters())
    base = OWN if OWN in one["weights"] else "none"
    assert off(one["weights"][base], tensor_bytes(weights)) <= FOOTPRINT_LEDGER
    assert off(one["adapter"], tensor_bytes(added)) <= FOOTPRINT_LEDGER
    assert off(one["gradients"], tensor_bytes([p.grad for p in adapted.parameters()])) <= FOOTPRINT_LEDGER
    assert off(device, tensor_bytes(optimizer_tensors(optimizer))) <= FOOTPRINT_LEDGER
    assert host == 0


@pytest.mark.slow
@pytest.mark.parametrize("base", ["nf4", "nf4-dq"])
def test_a_packed_base(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Wide enough that a table of levels, which is not predicted, is little beside the codes; dense weights are left out.
    wide = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1}
    monkeypatch.setattr(small_llama, "SMALL", SMALL | wide)
    model, adapted = attached("lora", "float32", base=base)
    adds = {id(t) for t in adapted.tensors().values()}
    measured = tensor_bytes(t for t in model_tensors(model) if id(t) not in adds)
    one = predicted("lora", "float32")["weights"]
    dense = one["none"] - 4 * sum(layer.base.in_features * layer.base.out_features for layer in adapted.layers.values())
    assert off(one[base] - dense, measured - dense) <= FOOTPRINT_LEDGER


def test_a_residual_in_the_place_of_the_weight() -> None:
    model, adapted = attached("pissa", "float32", "hf-peft")
    adds = {id(t) for t in adapted.tensors().values()}
    one = predicted("pissa", "float32")
    measured = tensor_bytes(t for t in model_tensors(model) if id(t) not in adds)
    assert set(one["weights"]) == {OWN}
    assert off(one["weights"][OWN], measured) <= FOOTPRINT_LEDGER


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_as_cells_have_them(name: Any, dtype: str) -> None:
    """With masters in 16 bits, whichever it is; what is paged is counted apart, and on a CPU lies in the same memory."""
    model, adapted = attached("full", dtype)
    optimizer, _ = optimizers.make(adapted, [], Training(steps=1), name)
    stepped(model, adapted, optimizer)
    device, host = predicted("full", dtype)["optimizer"][name]
    assert off(device + host, tensor_bytes(optimizer_tensors(optimizer))) <= FOOTPRINT_LEDGER


def test_what_is_paged_is_in_host_memory() -> None:
    model, adapted = attached("full", "float32")
    paged = Paged(torch.optim.AdamW(adapted.parameters()), budget=0)
    stepped(model, adapted, paged)
    away = [t for p in paged.state for t in paged.state[p].values() if paged.where().get(p) == "host" and t.dim()]
    assert away
    assert off(predicted("full", "float32")["optimizer"]["paged-adamw"][1], tensor_bytes(away)) <= FOOTPRINT_LEDGER


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_activations_are_what_autograd_saves(method: str, dtype: str) -> None:
    model, _ = attached(method, dtype)
    assert off(predicted(method, dtype)["activations"][0], saved(model)) <= FOOTPRINT_ACTIVATIONS


@pytest.mark.parametrize("implementation", ["hf-peft", "fused"])
def test_activations_of_other_implementations(implementation: str) -> None:
    model, _ = attached("lora", "float32", implementation)
    assert off(predicted("lora", "float32")["activations"][0], saved(model)) <= FOOTPRINT_ACTIVATIONS


def test_a_bias_of_b_is_counted_as_it_trains_and_saves_no_activations() -> None:
    config = METHODS["lora"] | {"lora_bias": True}
    (one,) = counting.count(SMALL, "causal", "bfloat16", {"lora": [config]}, [])["methods"]["lora"]
    plain, model = predicted("lora", "bfloat16"), llama("bfloat16")
    adapted = discover().find("method", "lora", "fused")(model, configure("lora", config), torch.Generator())
    assert one["trainable"] == sum(p.numel() for p in adapted.parameters())
    assert one["trainable"] - plain["trainable"] == 3 * (128 + 64 + 64 + 128 + 320 + 320 + 128)
    assert one["adapter"] == tensor_bytes(list(adapted.tensors().values()))
    assert one["activations"] == plain["activations"]
    assert off(one["activations"][0], saved(model)) <= FOOTPRINT_ACTIVATIONS


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapted_embedding_is_counted_without_activations(method: str) -> None:
    config = METHODS[method] | {"targets": ["embed_tokens", "q_proj"]}
    (one,) = counting.count(SMALL, "causal", "float32", {method: [config]}, [])["methods"][method]
    assert one["error"] == ""
    assert one["trainable"] > 0
    assert one["activations"] is None


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], ["gate_proj", "up_proj"]], ids=" ".join)
def test_activations_of_few_adapted_layers(targets: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # A layer that is not adapted keeps no input: which ones are must be seen.
    monkeypatch.setitem(METHODS, "lora", {"rank": 4, "targets": targets})
    model, _ = attached("lora", "float32")
    assert off(predicted("lora", "float32")["activations"][0], saved(model)) <= FOOTPRINT_ACTIVATIONS


def saved(model: Any) -> float:
    """Return the bytes a token that a real forward pass saves: what grows from 32 tokens to 96, in two texts."""

    def at(tokens: int) -> int:
        ids = torch.arange(2 * tokens).view(2, tokens)
        return sum(saved_activations.saved_by(model, input_ids=ids, use_cache=False).values())

    return (at(96) - at(32)) / (2 * 64)


def test_each_method_that_saves_tensors_of_a_fixed_size_is_named_as_an_exception() -> None:
    """Only Methods without a `fused` layer are tried: the steps of the others are those of `fused`."""
    found = {}
    for method in methods().keys() - METHODS.keys():
        if not hasattr(configure(method, {}), "targets"):
            continue
        model = torch.nn.Sequential(OrderedDict(q_proj=torch.nn.Linear(256, 256, bias=False, device="meta")))
        with counting.attached(model, method, configure(method, {"targets": ["q_proj"]})) as adapted:
            layer: Any = adapted.layers["q_proj"]
            kept = [torch.empty(8 * n, 256, device="meta", requires_grad=True) for n in (1, 2)]
            few, more = (sum(saved_activations.saved_by(layer, x).values()) for x in kept)
            own = sum(p.nbytes for p in layer.parameters())
        found[method] = 2 * few - more - own
    assert {method for method, fixed_B in found.items() if fixed_B > 0} == {"oft", "loha", "lokr"}
    for text in (PARTS["activations"], (TOP / "harness" / "memory_model" / "README.md").read_text(encoding="utf-8")):
        assert all(name in text for name in ("OFT", "LoHa", "LoKr"))


def test_with_checkpointing_a_block_keeps_its_input_alone() -> None:
    plain, kept_again = predicted("lora", "float32")["activations"]
    (deeper,) = counting.count(SMALL | {"num_hidden_layers": 30}, "causal", "float32", {"lora": [METHODS["lora"]]}, [])[
        "methods"
    ]["lora"]
    of_block = (deeper["activations"][1] - kept_again) / 27
    assert off(int(of_block), SMALL["hidden_size"] * 4) <= FOOTPRINT_ACTIVATIONS
    assert kept_again < plain


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_logits(dtype: str) -> None:
    model = llama(dtype)
    tokens, found = 16, predicted("lora", dtype)["logits"]
    logits = torch.randn(tokens, SMALL["vocab_size"], dtype=DTYPES[dtype], requires_grad=True)
    wide = logits if dtype == "float64" else logits.float()
    logs = torch.nn.functional.log_softmax(wide, -1)
    (gradient,) = torch.autograd.grad(logs[:, 0].sum(), wide)
    assert model.config.vocab_size == SMALL["vocab_size"]
    assert found * tokens == logits.nbytes + logs.nbytes + gradient.nbytes


def test_all_linear_layers_but_those_of_the_output_are_adapted() -> None:
    for kind, config in CONFIGS.values():
        model = structure.build(config, kind, torch.float32)
        names = counting.default_targets(model)
        adapted = adaptable_layers(model, configure("lora", {"targets": names}))
        linear = {path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        assert linear - set(adapted) == {"classifier" if kind == "encoder" else "lm_head"}


def test_a_config_that_cannot_be_counted_leaves_the_others_counted() -> None:
    configs = {"lora": [{"rank": "many"}, METHODS["lora"]], "peft": [{"adapter_config": {"peft_type": "LORA"}}]}
    found = counting.answer({"config": SMALL, "kind": "causal", "dtype": "float32", "methods": configs, "targets": []})
    odd, good = found["methods"]["lora"]
    assert odd["error"].startswith("its shape cannot be counted: TypeError")
    assert good == counting.count(SMALL, "causal", "float32", {"lora": [METHODS["lora"]]}, [])["methods"]["lora"][0]
    assert found["methods"]["peft"][0]["error"] == "there is no reference of `peft` to count"
