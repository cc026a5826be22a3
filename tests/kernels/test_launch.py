"""Launches: the error of a kernel that fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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
