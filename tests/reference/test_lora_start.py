"""Where LoRA starts from: each start is what its source says, and an old Cell does not know that there are others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.conformance.tolerance_constants import INITIAL_SIGMAS, NOISE_FLOOR_EPS
from harness.suites import loader
from reference.lora import Config
from reference.shared.lora_start import initial_factors, write_initial_factors

R, D, E = 16, 400, 300

SUITE = """\
suite: starts
title: Starts
matrix:
  - model: tiny-llama
    task: toy-sentiment
    method: lora
    training: {{steps: 2, batch: 2}}
    evaluation: {{items: 4}}
    config: {{rank: 4{init}}}
"""


def drawn(init: str, rank: int = R, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return initial_factors(init, rank, D, E, torch.Generator().manual_seed(seed))


def spread(A: torch.Tensor) -> float:
    return float(A.square().mean().sqrt())


def did_you_mean(value: float, wanted: float, count: int) -> bool:
    return abs(value / wanted - 1) < INITIAL_SIGMAS * count**-0.5


def test_the_usual_start() -> None:
    A, B = drawn("kaiming")
    assert float(A.abs().max()) <= D**-0.5
    assert did_you_mean(spread(A), (3 * D) ** -0.5, A.numel())
    assert not B.any()


@pytest.mark.parametrize("rank", [4, 64])
def test_pefts_gaussian_has_one_over_the_rank(rank: int) -> None:
    A, B = drawn("gaussian", rank)
    assert did_you_mean(spread(A), 1 / rank, A.numel())
    assert float(A.abs().max()) > 3 / rank  # no uniform distribution of that spread gets so far
    assert not B.any()


def test_orthogonal_factors_are_not_zero_and_their_product_is() -> None:
    A, B = drawn("orthogonal")
    assert did_you_mean(spread(A), 0.005**0.5, A.numel() // 2)
    assert did_you_mean(spread(B), 0.005**0.5, B.numel() // 2)
    size = torch.linalg.matrix_norm(A) * torch.linalg.matrix_norm(B) * torch.finfo(A.dtype).eps
    assert float(torch.linalg.matrix_norm(B @ A)) < NOISE_FLOOR_EPS["float64"] * float(size)
    assert torch.linalg.matrix_rank(A) == torch.linalg.matrix_rank(B) == R // 2
    with pytest.raises(ValueError, match="rank 3 is odd"):
        drawn("orthogonal", 3)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_a_start_depends_only_on_the_generator(init: str) -> None:
    one, same, other = drawn(init), drawn(init), drawn(init, seed=1)
    assert torch.equal(one[0], same[0])
    assert not torch.equal(one[0], other[0])
    A, B = torch.empty(R, D, dtype=torch.float32), torch.empty(E, R, dtype=torch.float32)
    write_initial_factors(init, A, B, torch.Generator().manual_seed(0))
    assert torch.equal(A, one[0].float())
    assert torch.equal(B, one[1].float())


def cells(folder: Path, init: str) -> list[tuple[str, dict[str, object]]]:
    path = folder / "suite.yaml"
    path.write_text(SUITE.format(init=init), encoding="utf-8")
    return [(cell.cell_id, dict(cell.config)) for cell in loader.load(path).plan.cells]


def test_a_cell_from_before_the_field_has_the_same_id(tmp_path: Path) -> None:
    (old,) = cells(tmp_path, "")
    assert "init" not in old[1]
    assert cells(tmp_path, ", init: kaiming") == [old]
    both = cells(tmp_path, ", init: [kaiming, gaussian]")
    assert both[0] == old
    assert both[1][1]["init"] == "gaussian"
    assert both[1][0] != old[0]
    assert Config().init == "kaiming"
