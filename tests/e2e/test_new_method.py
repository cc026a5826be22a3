"""A new Method is two files, `reference/NAME.py` and `suites/parity/NAME.yaml`: every command finds it by them alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import harness
from harness.methods.spec import methods

pytestmark = pytest.mark.e2e

REPOSITORY = Path(harness.__file__).resolve().parents[1]
FEDPARA = '''"""FedPara: low-rank Hadamard product. Hyeon-Woo et al., ICLR 2022, arXiv:2108.06098.

    h = W0 x + s ((B1 A1) * (B2 A2)) x
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from reference.shared.adapted import AdaptedLayer, AdaptedLayers
from reference.shared.layers import dense_copy, device_of, floating_dtype, replace, targets
from reference.spec import Deviation, ReferenceSpec

SPEC = ReferenceSpec(
    paper="arXiv:2108.06098v3",
    factors=("A1", "B1", "A2", "B2"),
    deviations=(Deviation(topic="start", paper="not stated", here="B2 is zero", why="as in LyCORIS"),),
)


@dataclass(frozen=True)
class Config:
    """Hyperparameters of FedPara."""

    rank: int = field(default=4, metadata={"minimum": 1, "maximum": 512})
    """Rank of both products."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Layers to adapt."""


class FedParaLinear(AdaptedLayer):
    def __init__(self, base: nn.Linear, factors: dict[str, Tensor]) -> None:
        super().__init__()
        self.base = base
        for name, factor in factors.items():
            self.register_parameter(name, nn.Parameter(factor))

    def delta(self) -> Tensor:
        return (self.B1 @ self.A1) * (self.B2 @ self.A2)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.delta().T

    def tensors(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters(recurse=False))

    def merged(self) -> nn.Linear:
        dense = dense_copy(self.base)
        with torch.no_grad():
            dense.weight += self.delta().to(dense.weight.dtype)
        return dense


def attach(model: nn.Module, config: Config, generator: torch.Generator) -> AdaptedLayers:
    layers = {}
    for path, base in targets(model, config.targets).items():
        like = {"dtype": floating_dtype(base), "device": device_of(base)}
        (E, D), R = base.weight.shape, config.rank
        factors = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).div(math.sqrt(shape[1])).to(**like)
            for name, shape in {"A1": (R, D), "B1": (E, R), "A2": (R, D)}.items()
        }
        layers[path] = FedParaLinear(base, factors | {"B2": torch.zeros(E, R, **like)})
    model.requires_grad_(False)
    for path, layer in layers.items():
        replace(model, path, layer.requires_grad_(True))
        layer.base.requires_grad_(False)
    return AdaptedLayers(model, layers)
'''
PARITY = """method: fedpara
follows: the paper
checks: [layers, parameters, base, identity, initial, forward, gradient, step, merge, detach]
states: [init, warm]
configs: [{rank: 3}]
shapes: [{tokens: 5, in: 24, out: 16}]
dtypes: [float64, float32]
"""
SUITE = """suite: mine
title: FedPara
about: A suite of a new Method.
matrix:
  - model: tiny-llama
    task: toy-sentiment
    implementation: reference
    training: {steps: 2, batch: 4, max_tokens: 24, lr: 5e-3}
    evaluation: {items: 8, batch: 8}
    method: fedpara
    config: {rank: 2, targets: [q_proj]}
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the repository with the two files of FedPara."""
    top = tmp_path_factory.mktemp("checkout")
    for name in ("harness", "reference", "suites"):
        shutil.copytree(REPOSITORY / name, top / name, ignore=shutil.ignore_patterns("__pycache__"))
    (top / "reference" / "fedpara.py").write_text(FEDPARA, encoding="utf-8")
    (top / "suites" / "parity" / "fedpara.yaml").write_text(PARITY, encoding="utf-8")
    (top / "mine.yaml").write_text(SUITE, encoding="utf-8")
    return top


def run(top: Path, *arguments: str, code: int | None = 0) -> str:
    command = [sys.executable, "-P", "-m", "harness.cli", *arguments]
    # An empty cache: a plan predicts no memory of a model that is not here, which takes a process with torch.
    environment = os.environ | {"PYTHONPATH": str(top), "COLUMNS": "200", "PEFT_HARNESS_CACHE": str(top / "cache")}
    done = subprocess.run(command, cwd=top, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert code in (None, done.returncode), done.stdout + done.stderr
    return done.stdout


def test_spec_is_read_without_torch(checkout: Path) -> None:
    info = methods(checkout / "reference")["fedpara"]
    assert info.spec.factors == ("A1", "B1", "A2", "B2")
    assert info.spec.deviations[0].topic == "start"
    assert (info.fields["rank"].maximum, info.fields["rank"].about) == (512, "Rank of both products.")


def test_list_and_explain_show_it(checkout: Path) -> None:
    rows = json.loads(run(checkout, "list", "methods", "--json"))["methods"]
    (row,) = (row for row in rows if row["name"] == "fedpara")
    assert (row["paper"], row["implementations"]) == ("arXiv:2108.06098v3", ["reference"])
    text = run(checkout, "explain", "fedpara")
    assert "rank: a whole number, default 4, at least 1, at most 512\n      Rank of both products." in text


def test_suites_know_its_config(checkout: Path) -> None:
    assert "fedpara" in run(checkout, "plan", "mine.yaml")


def test_check_judges_it(checkout: Path) -> None:
    command = ("check", "reference", "--method", "fedpara", "--json", "--patience", "120")
    results = [one["result"] for one in json.loads(run(checkout, *command, code=None))["checks"]]
    # A slow machine may add a finding about the worker process itself.
    assert {one["outcome"] for one in results if one["check"].startswith("fedpara/")} == {"pass"}
    assert {"fedpara/gradient/float32/warm", "fedpara/merge/float64/warm"} <= {one["check"] for one in results}


def test_malformed_spec_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "fedpara.py").write_text(FEDPARA.replace("factors=", "letters="), encoding="utf-8")
    with pytest.raises(TypeError, match=r"fedpara\.py.*letters"):
        methods(tmp_path)
