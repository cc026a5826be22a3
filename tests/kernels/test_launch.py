"""Launches: the error of a kernel that fails, and the table of crossovers of a card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.bench import crossovers
from harness.kernels import crossover

pytest.importorskip("triton", reason="launches need Triton")


class _Kernel:
    __name__ = "_decode"
    arg_names = ("packed", "count", "BLOCK")

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*_: Any, **__: Any) -> None:
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

        return run


def test_a_failed_launch_names_its_kernel_its_arguments_and_its_options() -> None:
    from harness.kernels.triton.support.launch import launch

    with pytest.raises(RuntimeError) as caught:
        launch(_Kernel(), (4, 2), torch.zeros(3, 5, dtype=torch.uint8), 15, BLOCK=64, num_warps=8)
    (note,) = caught.value.__notes__
    assert note == "in kernel _decode, grid (4, 2): packed=uint8[3, 5], count=15, BLOCK=64, num_warps=8"


def test_a_card_without_a_table_has_the_default_and_a_measured_table_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crossover.most_tokens.cache_clear()
    default = crossover.most_tokens("nf4_linear", "", 16384)
    assert default > 0
    assert crossover.most_tokens("nf4_linear", "ACME X1", 16384) == default
    rows = [
        {"E": E, "tokens": tokens, "fused_s": fused, "decoded_s": 1.0}
        for E, tokens, fused in ((1024, 1, 2.0), (4096, 1, 0.5), (4096, 8, 0.9), (4096, 16, 1.5), (4096, 32, 0.5))
    ]
    name = crossover.file_name("ACME X1 (80 GB)")
    assert name == "acme-x1-80-gb.json"
    (tmp_path / name).write_text(json.dumps(crossovers.table(rows)))
    monkeypatch.setenv(crossover.VARIABLE, str(tmp_path))
    crossover.most_tokens.cache_clear()
    found = [crossover.most_tokens("nf4_linear", "ACME X1 (80 GB)", E) for E in (512, 1024, 4096, 9999)]
    assert found == [0, 0, 8, 8]  # 32 tokens are faster again, but not all numbers up to them
    crossover.most_tokens.cache_clear()
