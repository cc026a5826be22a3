"""Planted faults of VeRA."""

from __future__ import annotations

from functools import partial
from typing import Any

from harness.conformance.faults import FaultCase, line_fault, planted
from harness.conformance.faults.patched_copy import PatchedCopy

_USUAL = {"rank": 3, "projection_key": 7}
CASE = FaultCase(values=_USUAL)

_vera = partial(line_fault, "vera", values=_USUAL)

# fmt: off
FAULTS = [
    _vera("ignores_the_key", ["projections"],
        'torch.Generator("cpu").manual_seed(key)', 'torch.Generator("cpu").manual_seed(0)'),
    _vera("keeps_31_bits_of_the_key", ["projections"], 'torch.Generator("cpu").manual_seed(key)',
        'torch.Generator("cpu").manual_seed(key & 0x7FFFFFFF)', values={"rank": 3, "projection_key": 3_000_000_007}),
    _vera("draws_other_projections_each_time", ["projections"], 'generator = torch.Generator("cpu").manual_seed(key)',
        'generator = torch.Generator("cpu")\n    generator.seed()'),
    _vera("gives_each_layer_its_own_projections", ["projections"], "A, B = shared[device, dtype]",
        "A, B = (t.to(dtype) for t in projections(config.projection_key, config.rank, D, E))"),
    _vera("sizes_its_projections_for_both_directions", ["projections"],
        "projections(config.projection_key, config.rank, widest, tallest)",
        "projections(config.projection_key, config.rank, max(widest, tallest), tallest)"),
    _vera("rounds_all_projections_as_its_first_layer_does", ["calls"], "A, B = shared[device, dtype]",
        "A, B = (t.to(dtype) for t in next(iter(shared.values())))"),
    _vera("draws_in_torchs_default_dtype", ["settings"],
        'torch.empty(rows, fan_in, dtype=torch.float32, device="cpu")', 'torch.empty(rows, fan_in, device="cpu")'),
    _vera("draws_b_before_a", ["projections"], "return kaiming(rank, in_features), kaiming(out_features, rank)",
        "return (kaiming(out_features, rank), kaiming(rank, in_features))[::-1]"),
    # Swap b and d, which raises no error if the rank equals the width.
    _vera("swaps_b_and_d", ["forward", "gradient"],
        "h_TR = self.d * (self.dropout(x_TD) @ self.A.T)", "h_TR = self.b * (self.dropout(x_TD) @ self.A.T)",
        "self.base(x_TD) + self.b * (h_TR @ self.B.T)", "self.base(x_TD) + self.d * (h_TR @ self.B.T)",
        values={"rank": 24, "projection_key": 7}, inputs=24, outputs=24),
    _vera("leaves_out_d", ["forward"],
        "h_TR = self.d * (self.dropout(x_TD) @ self.A.T)", "h_TR = self.dropout(x_TD) @ self.A.T"),
    _vera("starts_with_b_not_zero", ["initial", "identity"], "b = torch.zeros(E, dtype", "b = torch.ones(E, dtype"),
    _vera("ignores_d_initial", ["initial"],
        "config.d_initial, dtype=dtype", "0.1, dtype=dtype", values={**_USUAL, "d_initial": 0.5}),
    _vera("merges_a_square_conv1d_transposed", ["merge"],
        'W_ED.T if kind_of(base) in ("Conv1D", "embedding") else W_ED',
        "W_ED", file="layers", layer="conv1d", inputs=32, outputs=32),
]
# fmt: on


@planted("vera", "layers", values=_USUAL)
def trains_the_projections(copy: PatchedCopy) -> None:
    def change(layer: Any) -> None:
        trained = copy.module().nn.Parameter(layer.A.clone())
        del layer.A
        layer.A = trained

    copy.change_layers(change)
