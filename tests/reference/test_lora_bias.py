"""`lora_bias`: y = W x + b + s (B A x + c), in the references, in our fused kernels, and saved in peft's format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from harness.cell.serving import adapter_folders
from harness.conformance.subject import Subject, configure, warm
from harness.errors import Unsupported
from harness.methods.implementations.fused.methods.lora import attach as fused_lora
from harness.methods.implementations.fused.methods.qlora import attach as fused_qlora
from harness.methods.implementations.hf_peft import lora as hf_peft
from reference import adapter_file, lora, qlora
from support.lora_layers import warmed as warmed_layer
from support.two_layer_model import Two, assert_same, draw, generator

ATTACH: dict[str, tuple[str, Callable[..., Any]]] = {
    "reference": ("lora", lora.attach), "fused": ("lora", fused_lora), "hf-peft": ("lora", hf_peft.lora),
    "qlora": ("qlora", qlora.attach), "fused-qlora": ("qlora", fused_qlora),
}  # fmt: skip
implementations = pytest.mark.parametrize("name", ATTACH)
merging = pytest.mark.parametrize("name", [name for name in ATTACH if name != "hf-peft"])


def attached(name: str, **config: Any) -> Any:
    method, attach = ATTACH[name]
    chosen = {"rank": 2, "alpha": 6, "targets": ["q_proj", "v_proj"], "lora_bias": True, **config}
    return attach(Two(), configure(method, chosen), generator(5))


def warmed(name: str, **config: Any) -> Any:
    adapted = attached(name, **config)
    warm(adapted.tensors(), generator(6))
    return adapted


def of(adapted: Any, path: str) -> tuple[Tensor, Tensor, Tensor]:
    A, B, c = (adapted.tensors()[f"{path}.{letter}"].detach().clone() for letter in "ABc")
    return A, B, c


@implementations
@pytest.mark.parametrize(("path", "inputs", "outputs"), [("q_proj", 12, 10), ("v_proj", 10, 7)])
def test_the_scaled_bias_is_added_whether_the_base_has_a_bias_or_not(
    name: str, path: str, inputs: int, outputs: int
) -> None:
    adapted, x = warmed(name), draw(5, inputs)
    A, B, c = of(adapted, path)
    assert c.shape == (outputs,)
    with torch.no_grad():
        y = adapted.layers[path](x)
        for tensor in adapted.tensors().values():
            tensor.zero_()
        base = adapted.layers[path](x)
    assert_same({"y": y}, {"y": base + 3 * (x @ A.T @ B.T + c)})


@implementations
def test_the_bias_gets_the_scaled_gradient(name: str) -> None:
    adapted, dy = warmed(name), draw(5, 10, seed=2)
    c = adapted.tensors()["q_proj.c"]
    adapted.layers["q_proj"](draw(5, 12)).backward(dy)
    assert_same({"c": c.grad}, {"c": 3 * dy.sum(0)})


@implementations
def test_the_bias_starts_at_zero_and_counts_one_number_per_output(name: str) -> None:
    plain, biased = attached(name, lora_bias=False), attached(name)
    assert all(not biased.tensors()[f"{path}.c"].any() for path in ("q_proj", "v_proj"))
    numbers = [sum(p.numel() for p in adapted.parameters()) for adapted in (plain, biased)]
    assert numbers[1] - numbers[0] == 10 + 7


@merging
def test_merging_gives_a_layer_without_a_bias_one_and_unmerging_takes_it_away(name: str) -> None:
    adapted, x = warmed(name), draw(5, 12)
    c = of(adapted, "v_proj")[2]
    y = adapted.model(x).detach()
    adapted.merge()
    assert type(adapted.model.v_proj) is nn.Linear
    assert_same({"bias": adapted.model.v_proj.bias.detach()}, {"bias": 3 * c})
    assert_same({"y": adapted.model(x).detach()}, {"y": y})
    adapted.unmerge()
    adapted.detach()
    assert adapted.model.v_proj.bias is None
    assert_same(dict(adapted.model.state_dict()), dict(Two().state_dict()))


def test_peft_merges_where_the_base_has_a_bias_and_refuses_where_it_has_none() -> None:
    adapted, x = warmed("hf-peft", targets=["q_proj"]), draw(5, 12)
    y = adapted.model(x).detach()
    adapted.merge()
    assert_same({"y": adapted.model(x).detach()}, {"y": y})
    refuses = warmed("hf-peft")
    with pytest.raises(Unsupported, match="v_proj: peft cannot merge lora_bias into a layer without a bias"):
        refuses.merge()
    assert torch.equal(refuses.layers["q_proj"].get_base_layer().weight, Two().q_proj.weight)


def test_peft_refuses_another_start_of_a() -> None:
    with pytest.raises(Unsupported, match="lora_bias with init=kaiming only, not with init=gaussian"):
        attached("hf-peft", init="gaussian")


@pytest.mark.parametrize(("name", "conv"), [("Conv1D", "peft"), ("plain", "peft"), ("everything", "loralib")])
def test_every_output_of_a_conv1d_and_every_channel_of_an_image_gets_its_number(name: str, conv: str) -> None:
    adapted = warmed_layer(name, conv=conv, lora_bias=True)
    layer = adapted.layers["layer"]
    x = draw(2, 3, 12) if name == "Conv1D" else draw(2, 6, 9, 8)
    c = layer.c.detach().clone()
    y = layer(x).detach()
    with torch.no_grad():
        layer.c.zero_()
        added = y - layer(x)
        layer.c.copy_(c)
    wanted = layer.scaling * (c if name == "Conv1D" else c[:, None, None])
    assert_same({"added": added + y}, {"added": wanted.expand_as(y) + y})
    adapted.merge()
    assert_same({"y": adapted.model(x).detach()}, {"y": y})


@pytest.mark.parametrize("name", ["embedding", "scaled"])
def test_an_embedding_has_no_bias(name: str) -> None:
    with pytest.raises(ValueError, match="layer: lora_bias adapts linear layers and convolutions only"):
        warmed_layer(name, lora_bias=True)


@pytest.mark.parametrize("name", ["reference", "fused", "fused-qlora"])
def test_autocast_decides_the_dtype_of_the_output(name: str) -> None:
    method, attach = ATTACH[name]
    config = configure(method, {"rank": 2, "targets": ["q_proj"], "lora_bias": True})
    adapted = attach(Two(torch.float32), config, generator(5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adapted.layers["q_proj"](draw(5, 12, dtype=torch.float32)).dtype == torch.bfloat16


def test_a_saved_adapter_means_the_same_to_a_reader_of_pefts_files(tmp_path: Path) -> None:
    adapted, x = warmed("reference"), draw(5, 12)
    y = adapted.model(x).detach()
    config = configure("lora", {"rank": 2, "alpha": 6, "targets": ["q_proj", "v_proj"], "lora_bias": True})
    bases: dict[str, nn.Module] = {path: layer.base for path, layer in adapted.layers.items()}
    subject = Subject("lora", config, "float64", adapted.model, adapted, bases)
    adapter_folders.save(subject, adapted.tensors(), tmp_path / "base", tmp_path / "adapter")
    keys = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.v_proj.lora_B.bias" in tensors
    model = Two()
    reading = adapter_file.apply(model, adapter_file.AdapterSettings.of(keys), tensors)
    assert reading.unused == {}
    assert_same({"y": model(x).detach()}, {"y": y})
