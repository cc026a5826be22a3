"""Read how known loaders interpret the features of an adapter file, from loader_readings.yaml."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from harness import yaml_lines
from harness.conformance.adapter_files.adapter_file import AdapterFile
from harness.conformance.adapter_files.findings import Finding, is_saved_embedding
from harness.methods.unsupported_adapters import unsupported
from harness.records.base_model import FrozenModel

Verdict = Literal["wrong", "refused", "not known", "ok"]
"""Result of a loader for a feature. `wrong`: it computes other logits than the file gives, and raises no error. `refused`:
it raises an error. `not known`: loader_readings.yaml does not say. `ok`: it computes the logits that the file gives."""
_ACTIVATED = "alora_invocation_tokens"
_WORST_FIRST: tuple[Verdict, ...] = ("wrong", "refused", "not known", "ok")


class Reading(FrozenModel):
    """What a loader does with one feature of an adapter file."""

    reading: Literal["wrong", "refused", "ok"]
    because: str = ""
    source: str


class KnownLoader(FrozenModel):
    """A loader, and its known readings of features."""

    loader: str
    readings: dict[str, Reading]


class _File(FrozenModel):
    features: dict[str, str]
    loaders: list[KnownLoader]


@dataclass(frozen=True)
class LoaderVerdict:
    """The worst of a loader's readings of the features of a file."""

    loader: str
    verdict: Verdict
    feature: str
    """The feature that decides. Empty if the verdict is `ok`."""
    because: str
    source: str


@cache
def _read() -> _File:
    return yaml_lines.load_model(Path(__file__).with_suffix(".yaml"), _File)[1]


def features(adapter: AdapterFile, findings: Sequence[Finding] = (), tied: bool = False) -> list[str]:
    """List the features that an adapter uses, in the order of loader_readings.yaml.

    findings: findings about the adapter. tied: whether the base ties its head to its embedding.
    """
    settings, keys = adapter.settings, list(adapter.header)
    head = any(".lm_head.lora_" in key for key in keys)
    other = {key.partition("=")[0] for key in unsupported(adapter.config)}
    experts = bool(settings.target_parameters)
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
        "experts": experts,
        "rslora_experts": experts and settings.use_rslora,
        "unmatched_keys": any(one.kind == "unmatched-key" for one in findings),
        "activated": _ACTIVATED in other,
        "unsupported": bool(other - {_ACTIVATED}),
    }
    return [name for name in _read().features if used[name]]


def verdicts(used: list[str]) -> Iterator[LoaderVerdict]:
    """Yield how each known loader reads a file with these features."""
    for known in _read().loaders:
        found = [_of_feature(known, feature) for feature in used]
        yield min(found, key=lambda one: (_WORST_FIRST.index(one.verdict), not one.because))


def _of_feature(known: KnownLoader, feature: str) -> LoaderVerdict:
    reading = known.readings.get(feature)
    if reading is None:
        return LoaderVerdict(known.loader, "not known", feature, "", "")
    decides = "" if reading.reading == "ok" else feature
    return LoaderVerdict(known.loader, reading.reading, decides, reading.because, reading.source)
