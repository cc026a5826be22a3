"""The table of a card decides who computes: Triton or torch, and with which tile."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from harness.conformance import parity_suite
from harness.conformance.execution import suite_run
from harness.conformance.parity_suite import OperationCase
from harness.kernels import card_tables
from harness.kernels.torch.lora_linear import lora_linear
from harness.kernels.torch.multi_lora_linear import multi_lora_linear
from harness.kernels.torch.nf4 import quantize
from harness.kernels.torch.nf4_lora_linear import nf4_lora_linear
from harness.kernels.triton.support import gemm_tiles, low_rank_gemm, tuned_tiles
from harness.methods.registry import Implementation
from harness.records.record import Outcome

Use = Callable[[dict[str, Any]], None]


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """Yield a function that makes its argument the table of this machine."""

    def write(table: dict[str, Any]) -> None:
        (tmp_path / card_tables.file_name("")).write_text(json.dumps(table))
        monkeypatch.setenv(card_tables.VARIABLE, str(tmp_path))
        card_tables.tables.cache_clear()

    yield write
    card_tables.tables.cache_clear()


@contextmanager
def calls(operation: str) -> Iterator[mock.Mock]:
    """Count the calls of an Operation of Triton."""
    module = importlib.import_module(f"harness.kernels.triton.{operation}")
    with mock.patch.object(module, operation, wraps=getattr(module, operation)) as called:
        yield called


def failures(operation: str, values: dict[str, Any], dtype: str) -> list[str]:
    """Return what the conformance engine finds wrong with an Operation as `fused` offers it."""
    function = getattr(importlib.import_module(f"harness.kernels.torch.{operation}"), operation)
    plan = parity_suite.load_operation(operation).model_copy(update={"checks": ["outputs", "backward"]})
    subject = Implementation("ours", "operation", operation, function)
    results = [one.result for one in suite_run.run_case(subject, plan, OperationCase(values, dtype))]
    assert len(results) == 2
    return [str(result) for result in results if result.outcome is not Outcome.PASS]


def up_to(rank: int) -> dict[str, Any]:
    return {"lora_linear": {"rows": [{"E": 40, "rank": rank}]}}


def adapted(rank: int, E: int = 48, *, masked: bool = False, packed: bool = False) -> None:
    x, A, B = torch.randn(3, 64), torch.randn(rank, 64), torch.randn(E, rank)
    mask = torch.ones_like(x) if masked else None
    if packed:
        nf4_lora_linear(x, *quantize(torch.randn(E, 64), 64), 64, (E, 64), None, A, B, 2.0, mask)
    else:
        lora_linear(x, torch.randn(E, 64), None, A, B, 2.0, mask)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where a block is short
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "nf4"])
def test_above_the_rank_of_the_table_torch_computes_lora(packed: bool, use: Use) -> None:
    operation = "nf4_lora_linear" if packed else "lora_linear"
    with calls(operation) as triton:
        adapted(5, packed=packed)
        assert triton.call_count == 1  # without a table
        use(up_to(4))
        adapted(5, packed=packed)
        assert triton.call_count == 1
        adapted(4, packed=packed)
        adapted(5, E=39, packed=packed)  # smaller than every weight of the table
        adapted(5, masked=True, packed=packed)
        assert triton.call_count == 4


@pytest.mark.parametrize("operation", ["lora_linear", "nf4_lora_linear"])
def test_numbers_above_the_rank_of_the_table_are_those_of_the_reference(operation: str, use: Use) -> None:
    use(up_to(2))
    with calls(operation) as triton:
        assert failures(operation, {"shape": [48, 65], "rows": [2, 5], "rank": 3, "dropout": 0.0}, "bfloat16") == []
    assert triton.call_count == 0


IDS = [0, 0, -1, 2]


def several(ids: list[int] | Tensor, tokens: int = 3, trained: tuple[int, ...] = ()) -> list[Tensor]:
    """Call the layer with three adapters, of which those in `trained` require a gradient. Return the As."""
    As, Bs = [torch.randn(2, 16) for _ in range(3)], [torch.randn(24, 2) for _ in range(3)]
    for i in trained:
        As[i].requires_grad_()
    y = multi_lora_linear(torch.randn(4, tokens, 16), torch.randn(24, 16), As, Bs, [1.0, 2.0, 3.0], ids)
    if trained:
        y.sum().backward()
    return As


def per_adapter(tokens: int | None) -> dict[str, Any]:
    return {"multi_lora_linear": {"rows": [{"E": 1, "tokens_per_adapter": tokens}]}}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where a block is short
def test_above_the_tokens_of_the_table_torch_computes_several_adapters(use: Use) -> None:
    """Two adapters are used, by three sequences: with 3 tokens each, they have 4.5 tokens on average."""
    with calls("multi_lora_linear") as triton:
        several(IDS)
        assert triton.call_count == 1  # without a table
        use(per_adapter(4))
        module = importlib.import_module("harness.kernels.torch.multi_lora_linear")
        with mock.patch.object(module, "groups", wraps=module.groups) as grouped:
            several(IDS)
        assert grouped.call_count == 1  # the ids are read once
        several(torch.tensor(IDS), trained=(0, 2))
        assert triton.call_count == 1
        several(IDS, tokens=2)
        several([0, 2, 0, -1])  # the host would wait for the indices of the sequences of adapter 0
        As = several(IDS, trained=(0, 1))
        assert triton.call_count == 4
    assert As[1].grad is None  # the ids are on the host, so Triton's backward pass knows the unused adapter


def test_ids_on_a_device_are_never_read(use: Use) -> None:
    use(per_adapter(0))
    ids = torch.tensor(IDS, device="meta")  # reading it raises an error
    with calls("multi_lora_linear") as triton:
        triton.side_effect = lambda *_: torch.zeros(())
        multi_lora_linear(
            torch.randn(4, 3, 16), torch.randn(24, 16), [torch.randn(2, 16)], [torch.randn(24, 2)], [1.0], ids
        )
    assert triton.call_count == 1


def test_a_wrong_id_is_refused_on_both_ways(use: Use) -> None:
    for tokens in (0, None):
        use(per_adapter(tokens))
        with pytest.raises(ValueError, match="id 3: must be an adapter, 0 to 2"):
            several([0, 0, 3, 1])


def test_numbers_above_the_tokens_of_the_table_are_those_of_the_reference(use: Use) -> None:
    use(per_adapter(0))
    with calls("multi_lora_linear") as triton:
        values = {"ids": [1, -1, 0], "ranks": [3, 17], "shape": [35, 20], "tokens": 2}
        assert failures("multi_lora_linear", values, "bfloat16") == []
    assert triton.call_count == 0


def test_a_tuned_tile_is_launched_and_computes_the_same_numbers(use: Use) -> None:
    default = gemm_tiles.gemm_tile(70, 20, torch.bfloat16, torch.device("cpu"))
    (other,) = gemm_tiles.CANDIDATES[default]
    row = {"dtype": "bfloat16", "M": 128, "N": 32, "default": vars(default), "tile": vars(other)}
    stamp = tuned_tiles.stamp(low_rank_gemm.KERNEL, torch.device("cpu"))
    values = {"shape": [20, 24], "rows": [70], "rank": 3, "dropout": 0.0}
    for expected in (default, other):
        with mock.patch.object(low_rank_gemm, "product_launch", wraps=low_rank_gemm.product_launch) as launched:
            assert failures("lora_linear", values, "bfloat16") == []
        assert {call.args[0] for call in launched.call_args_list} == {expected}
        use({"tiles": {"stamp": stamp, "rows": [row]}})
