"""Read how known loaders interpret the features of an adapter file, from loader_readings.yaml.

A feature is a property of a file that a loader must support, such as `rslora` or `rank_pattern`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness import yaml_validation
from harness.conformance.adapter_files.adapter_file import AdapterFile
from harness.conformance.adapter_files.findings import Finding, is_saved_embedding
from harness.methods.unsupported_adapters import unsupported
from harness.records.base_model import FrozenModel
from reference.adapter_file import PREFIX

if TYPE_CHECKING:
    from torch import nn

FeatureVerdict = Literal["wrong", "refused", "not known", "ok"]
"""Result of a loader for a file with a feature. `wrong`: it raises no error, but computes other logits than the file
defines. `refused`: it raises an error. `not known`: loader_readings.yaml does not say. `ok`: it computes the logits
that the file defines."""
_EXPERT = re.compile(r"\.experts\.\d+\.(\w+)\.lora_A")
"""Part of a key that belongs to one expert's layer. The regular expression's group is the layer's name."""
_ACTIVATED = "alora_invocation_tokens"
_WORST_FIRST: tuple[FeatureVerdict, ...] = ("wrong", "refused", "not known", "ok")


class FeatureSupport(FrozenModel):
    """One loader's treatment of adapter files with one feature."""

    reading: Literal["wrong", "refused", "ok"]
    because: str = ""
    source: str


class KnownLoader(FrozenModel):
    """A loader, and how it treats each feature of adapter files."""

    loader: str
    readings: dict[str, FeatureSupport]


class _File(FrozenModel):
    features: dict[str, str]
    loaders: list[KnownLoader]


@dataclass(frozen=True)
class LoaderVerdict:
    """One loader's treatment of one adapter file: the worst result over the features of the file."""

    loader: str
    verdict: FeatureVerdict
    feature: str
    """Feature of the file that the verdict is about. Empty if the verdict is `ok`."""
    because: str
    source: str


@cache
def _read() -> _File:
    return yaml_validation.load_model(Path(__file__).with_suffix(".yaml"), _File)[1]


def features(adapter: AdapterFile, findings: Sequence[Finding] = (), base: nn.Module | None = None) -> list[str]:
    """List the features that an adapter uses, in the order of loader_readings.yaml.

    findings: findings about the adapter. base: the base model, whose parameters may be on the device `meta`. If None,
    features that depend on the base model are left out.
    """
    settings, keys = adapter.settings, list(adapter.header)
    head = any(".lm_head.lora_" in key for key in keys)
    other = {key.partition("=")[0] for key in unsupported(adapter.config)}
    experts = bool(settings.target_parameters)
    by_name = {name for key in keys for name in _EXPERT.findall(key)}
    tied = bool(getattr(getattr(base, "config", None), "tie_word_embeddings", False))
    layers = list(_convolutions(adapter, base))
    used = {
        "plain": True,
        "rslora": settings.use_rslora,
        "rank_pattern": bool(settings.rank_pattern),
        "alpha_pattern": bool(settings.alpha_pattern),
        "dora": settings.use_dora,
        "bias": settings.bias != "none",
        "lora_bias": settings.lora_bias,
        "modules_to_save": bool(settings.modules_to_save),
        "embedding": any(".lora_embedding_" in key for key in keys),
        "head": head,
        "tied_head": head and tied,
        "base_weights": any(key.endswith(".base_layer.weight") for key in keys),
        "saved_embeddings": any(is_saved_embedding(settings, key) for key in keys),
        "convolution": any(".lora_A" in key and len(one.shape) > 2 for key, one in adapter.header.items()),
        "dilated_convolution": any(set(one.dilation) != {1} for one in layers),
        "padded_convolution": any(one.padding_mode != "zeros" for one in layers),
        "experts": experts,
        "rslora_experts": experts and settings.use_rslora,
        "experts_by_name": bool(by_name),
        "experts_by_name_rslora": bool(by_name) and settings.use_rslora,
        "experts_by_name_rank_pattern": bool(by_name) and bool(settings.rank_pattern),
        "experts_by_name_alpha_pattern": bool(by_name) and bool(settings.alpha_pattern),
        "experts_by_name_without_w2": bool(by_name) and not by_name & {"w2", "down_proj"},
        "unmatched_keys": any(one.kind == "unmatched-key" for one in findings),
        "activated": _ACTIVATED in other,
        "unsupported": bool(other - {_ACTIVATED}),
    }
    return [name for name in _read().features if used[name]]


def _convolutions(adapter: AdapterFile, base: nn.Module | None) -> Iterator[Any]:
    """Yield the convolutions of the base for which the file has an update."""
    keys = [key for key, one in adapter.header.items() if ".lora_A" in key and len(one.shape) > 2]
    paths = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in keys}
    for path, module in base.named_modules() if base is not None else ():
        if path in paths and hasattr(module, "padding_mode"):
            yield module


def verdicts(used: list[str]) -> Iterator[LoaderVerdict]:
    """Yield a verdict on each known loader, for a file with the features `used`."""
    for known in _read().loaders:
        found = [_of_feature(known, feature) for feature in used]
        yield min(found, key=lambda one: (_WORST_FIRST.index(one.verdict), not one.because))


def _of_feature(known: KnownLoader, feature: str) -> LoaderVerdict:
    reading = known.readings.get(feature)
    if reading is None:
        return LoaderVerdict(known.loader, "not known", feature, "", "")
    decides = "" if reading.reading == "ok" else feature
    return LoaderVerdict(known.loader, reading.reading, decides, reading.because, reading.source)
