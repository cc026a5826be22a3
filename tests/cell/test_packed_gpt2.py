"""A base in NF4 under a GPT-2, whose layers are Conv1D: packed as those of any other model, and none is left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from harness.assets import conv1d, generated
from harness.cell import base_quantisation
from harness.conformance.comparison.tolerance_policies import exact
from harness.errors import Exit, Unsupported, UsageError
from harness.methods.implementations.bitsandbytes.weights import nf4
from harness.methods.registry import discover
from harness.records.record import Base, Outcome, Record
from reference.shared.layers import dense_weight
from support.sandbox import ForkSandbox

SUITE = """\
suite: packed
title: GPT-2 in four bits
sources:
  - {name: gpt2, kind: causal, source: folder:gpt2}
matrix:
  - model: gpt2
    task: toy-sentiment
    base: {quantization: nf4, implementation: bitsandbytes}
    training: {steps: 2, batch: 4, lr: 1e-3, max_tokens: 24}
    evaluation: {items: 4, batch: 4}
    cells:
      - {id: lora, method: lora, implementation: fused, config: {rank: 2, targets: [c_attn, mlp.c_proj]}}
      - {id: frozen, method: frozen, training: {steps: 0}}
"""
WIDTH, LAYERS = 64, 2  # rows of whole blocks: what bitsandbytes does on some CPUs with others is not the matter here


def gpt2(**more: Any) -> Any:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=64, **more))
    with torch.no_grad():  # fresh biases are 0, and one that is lost would not be seen
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_()
    return model.requires_grad_(False).eval()


@pytest.fixture
def records(fork_sandbox: ForkSandbox) -> dict[str, Record]:
    """Return the Records of the suite's two Cells, by their methods."""
    folder = fork_sandbox.folder / "gpt2"
    generated.tiny_llama(folder)
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
    gpt2(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2).save_pretrained(folder)
    (fork_sandbox.folder / "packed.yaml").write_text(SUITE, encoding="utf-8")
    finished = fork_sandbox.command("run", "packed.yaml", "--out", "run")
    assert finished.code == Exit.PASS, finished.err
    return {record.cell.method: record for record in fork_sandbox.read().records}


@pytest.mark.nightly
def test_cells_over_a_packed_gpt2(records: dict[str, Record]) -> None:
    attention, mlp = WIDTH * 3 * WIDTH, WIDTH * 4 * WIDTH
    every = attention + 2 * mlp + WIDTH * WIDTH
    wanted = {"lora": (2 * LAYERS, LAYERS * (attention + mlp)), "frozen": (4 * LAYERS + 1, LAYERS * every + 64 * WIDTH)}
    for method, (layers, weights) in wanted.items():
        outcomes = {check.check.split("/")[1]: check.outcome for check in records[method].checks}
        assert outcomes["codes"] is outcomes["forward"] is Outcome.PASS
        (note,) = (note for note in records[method].notes if note.startswith("base nf4: "))
        assert note.startswith(f"base nf4: {layers} layers with {weights:,} of the model's ")


def test_a_conv1d_is_packed_as_transformers_packs_it() -> None:
    """That is, transposed: what the packed layer multiplies by is the NF4 of (out, in)."""
    model, paths = gpt2(vocab_size=64), ["transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_proj"]
    linear = torch.nn.Module()
    linear.add_module("a", torch.nn.Linear(WIDTH, 3 * WIDTH))
    linear.add_module("b", torch.nn.Linear(4 * WIDTH, WIDTH))
    for name, path in zip("ab", paths, strict=True):
        linear.get_submodule(name).weight.data = model.get_submodule(path).weight.data.T.contiguous()
    nf4(linear, ["a", "b"], torch.float32)
    base = Base(quantization="nf4", implementation="bitsandbytes")
    x = torch.randn(3, 4 * WIDTH, generator=torch.Generator().manual_seed(0))
    biases = {path: model.get_submodule(path).bias.clone() for path in paths}
    assert conv1d.as_linear(model) == 4 * LAYERS
    base_quantisation.pack(model, paths, base, torch.float32, discover())
    for name, path in zip("ab", paths, strict=True):
        layer, wanted = model.get_submodule(path), linear.get_submodule(name)
        assert exact({"W": dense_weight(layer)}, {"W": dense_weight(wanted)}).passed
        zero = layer(0 * x[:, : layer.in_features])
        assert exact({"y": zero}, {"y": biases[path].expand_as(zero)}).passed


def test_what_is_not_linear_is_refused_before_anything_is_packed() -> None:
    model = gpt2(vocab_size=64)
    paths = ["transformer.h.0.attn.c_attn", "transformer.wte"]
    before = {path: type(model.get_submodule(path)) for path in paths}
    with pytest.raises(UsageError, match=r"transformer\.h\.0\.attn\.c_attn \(Conv1D\)"):
        base_quantisation.pack(
            model, paths, Base(quantization="nf4", implementation="bitsandbytes"), torch.float32, discover()
        )
    with pytest.raises(UsageError, match=r"transformer\.wte \(Embedding\)"):
        base_quantisation.pack(
            model, paths[1:], Base(quantization="nf4", implementation="bitsandbytes"), torch.float32, discover()
        )
    with pytest.raises(Unsupported, match="c_attn is a Conv1D; bitsandbytes packs linear layers"):
        nf4(model, paths, torch.float32)
    assert {path: type(model.get_submodule(path)) for path in paths} == before


def test_a_conv1d_that_stands_in_two_places_stays_one_and_computes_the_same() -> None:
    model = gpt2(vocab_size=64)
    model.transformer.h[1].mlp.c_fc = model.transformer.h[0].mlp.c_fc
    before, stored = sum(p.numel() for p in model.parameters()), model.transformer.h[0].mlp.c_fc.weight.T.clone()
    assert conv1d.as_linear(model) == 4 * LAYERS - 1
    assert model.transformer.h[1].mlp.c_fc is model.transformer.h[0].mlp.c_fc
    assert sum(p.numel() for p in model.parameters()) == before
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, stored)
