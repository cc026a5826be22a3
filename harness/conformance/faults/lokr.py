"""Planted faults of LoKr."""

from __future__ import annotations

from functools import partial

from harness.conformance.faults import FaultCase, line_fault, planted
from harness.conformance.faults.loha import merge_the_rank_dropout
from harness.conformance.faults.patched_copy import PatchedCopy

_USUAL = {"rank": 3, "alpha": 8.0, "factor": 2}
_FULL = {"rank": 64, "alpha": 32.0}
_LYCORIS = {**_USUAL, "init": "lycoris"}
_DROP = {**_USUAL, "rank_dropout": 0.25}
CASE = FaultCase(values=_USUAL)
_UPDATE = "self.scaling * torch.kron(C, block)"
_ROOT = "most = root if factor < 1 else min(factor, root)"
_ZERO = 'zero = "C" if config.init == "peft" else "W2" if full else "A"'

_lokr = partial(line_fault, "lokr", values=_USUAL)

# fmt: off
FAULTS = [
    _lokr("drops_the_rows_of_both_blocks_alike", ["rank_dropout"],
        "kept_E = torch.rand(len(delta_ED), dtype=torch.float32, device=delta_ED.device) >= self.p",
        "kept_E = (torch.rand(-(-len(delta_ED) // 2)) >= self.p).repeat(2)[: len(delta_ED)]",
        file="row_dropout", values=_DROP),
    _lokr("rounds_half_of_an_odd_side_down", ["parameters"],
        "max(V_E, V_D) / 2", "max(V_E, V_D) // 2", values={"rank": 3, "alpha": 8.0}, inputs=49, outputs=35),
    _lokr("forgets_the_scaling", ["forward", "gradient", "merge"], _UPDATE, "torch.kron(C, block)"),
    # LyCORIS does not scale if both blocks are full.
    _lokr("does_not_scale_full_blocks", ["forward", "gradient", "merge"], _UPDATE,
        '(1.0 if "W2" in self.right else self.scaling) * torch.kron(C, block)', values=_FULL),
    _lokr("divides_by_the_root_of_the_rank", ["forward", "merge"],
        "config.scaling, config.rank_dropout", "config.alpha / config.rank**0.5, config.rank_dropout"),
    _lokr("swaps_the_blocks", ["forward", "gradient"], _UPDATE, "self.scaling * torch.kron(block, C)"),
    # Order the rows by the position in the right block first.
    _lokr("interleaves_the_rows", ["forward", "gradient"], _UPDATE,
        "self.scaling * torch.einsum('ab,cd->cabd', self.C, block).reshape(-1, self.C.shape[1] * block.shape[1])"),
    _lokr("transposes_the_left_block", ["forward", "gradient"], _UPDATE,
        "self.scaling * torch.kron(C.T.contiguous(), block)"),
    _lokr("transposes_the_update", ["forward", "gradient"],
        "x_TD @ self.rank_dropout(self.delta()).T", "x_TD @ self.rank_dropout(self.delta())", inputs=32, outputs=32),
    _lokr("detaches_the_left_block", ["gradient", "step"], _UPDATE, "self.scaling * torch.kron(C.detach(), block)"),
    _lokr("ignores_the_factor", ["parameters"], _ROOT, "most = root"),
    _lokr("takes_the_factor_above_the_root", ["parameters"], "u = max(n for n in range(1, most + 1) if size % n == 0)",
        "u = factor if factor > 0 and size % factor == 0 else max(n for n in range(1, most + 1) if size % n == 0)",
        values={**_USUAL, "factor": 8}),
    _lokr("takes_the_smallest_divisor", ["parameters"], "u = max(n for n in range(1, most + 1) if size % n == 0)",
        "u = min((n for n in range(2, most + 1) if size % n == 0), default=1)", values={"rank": 2, "alpha": 8.0}),
    _lokr("divides_the_outputs_by_the_inputs_divisor", ["parameters"],
        "divided(base.out_features, config.factor), divided",
        "(divided(base.in_features, config.factor)[0], base.out_features // divided(base.in_features, config.factor)[0]), "
        "divided",
        values={"rank": 1, "alpha": 8.0}, inputs=40, outputs=32),
    _lokr("never_decomposes_the_right_block", ["parameters"], "full = config.rank >= max(V_E, V_D) / 2", "full = True"),
    _lokr("always_decomposes_the_right_block", ["parameters"],
        "full = config.rank >= max(V_E, V_D) / 2", "full = False", values=_FULL),
    _lokr("compares_the_rank_with_the_smaller_side", ["parameters"],
        "max(V_E, V_D) / 2", "min(V_E, V_D) / 2", values={**_USUAL, "rank": 8}),
    _lokr("halves_an_odd_side_in_whole_numbers", ["parameters"],
        "max(V_E, V_D) / 2", "max(V_E, V_D) // 2", values={"rank": 8, "alpha": 8.0}, inputs=17, outputs=13),
    _lokr("takes_the_factor_for_the_root", ["parameters"], _ROOT,
        "most = root if factor < 1 else min(factor, size)", values={"rank": 1, "alpha": 2.0, "factor": 36},
        inputs=64, outputs=96),
    _lokr("starts_with_c_not_zero", ["initial", "identity"], "torch.zeros(shape, **like)", "torch.ones(shape, **like)"),
    _lokr("ignores_the_choice_of_its_start", ["initial"], _ZERO, 'zero = "C"', values=_LYCORIS),
    _lokr("starts_with_both_blocks_zero", ["initial"],
        "if name == zero else", 'if name in ("C", zero) else', values=_LYCORIS),
    _lokr("starts_with_b_zero_instead_of_a", ["initial"],
        '"W2" if full else "A"', '"W2" if full else "B"', values=_LYCORIS),
    _lokr("starts_by_the_rows", ["initial"], "bound = columns**-0.5", "bound = rows**-0.5"),
    _lokr("leaves_the_left_block_out_of_its_tensors", ["parameters", "step"],
        'return {"C": self.C, **self.right}', "return dict(self.right)"),
    line_fault("lokr", "does_not_scale_the_rows_that_remain", ["rank_dropout"],
        "return delta_ED * (kept_E / share).to(delta_ED.dtype)[:, None]", "return delta_ED * kept_E[:, None]",
        file="row_dropout", values=_DROP),
]
# fmt: on


@planted("lokr", "merge", values=_DROP)
def merges_the_rank_dropout_of_training_mode(copy: PatchedCopy) -> None:
    """When merging, add the update with rank dropout applied, as in peft#3586."""
    copy.change_layers(merge_the_rank_dropout)
