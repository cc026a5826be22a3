"""Planted faults of OFT."""

from __future__ import annotations

from functools import partial

from harness.conformance.faults import FaultCase, line_fault

_USUAL = {"block_size": 8}
_EXACT = {**_USUAL, "cayley": "exact"}
CASE = FaultCase(values=_USUAL)
_ROTATE = 'torch.einsum("...nk,nkc->...nc", x_TNK, self.rotation())'
_SKEW = "return upper - upper.mT"

_oft = partial(line_fault, "oft", values=_USUAL)

# fmt: off
FAULTS = [
    _oft("computes_three_terms_as_four", ["each_setting"],
        "for _ in range(terms - 2):", "for _ in range(terms - 2 + (terms == 3)):"),
    # peft with use_cayley_neumann=False.
    _oft("inverts_the_exact_rotation", ["forward", "gradient", "merge"],
        "torch.linalg.solve(identity - Q, identity + Q)", "torch.linalg.solve(identity + Q, identity - Q)", values=_EXACT),
    _oft("inverts_the_rotation_of_the_input_alone", ["forward", "gradient"],
        _ROTATE, 'torch.einsum("...nk,nck->...nc", x_TNK, self.rotation())'),
    _oft("inverts_the_rotation_when_it_merges", ["merge"],
        '"enc,nkc->enk", W_ENK, self.rotation()', '"enc,nck->enk", W_ENK, self.rotation()'),
    _oft("packs_the_numbers_below_the_diagonal", ["forward", "gradient"], _SKEW, "return upper.mT - upper"),
    _oft("packs_the_numbers_column_by_column", ["forward", "gradient"],
        "rows, columns = torch.triu_indices(size, size, 1, device=packed.device)",
        "columns, rows = torch.tril_indices(size, size, -1, device=packed.device)"),
    _oft("makes_a_symmetric_matrix", ["forward", "gradient"], _SKEW, "return upper + upper.mT"),
    _oft("forgets_the_lower_triangle", ["forward", "gradient"], _SKEW, "return upper"),
    _oft("takes_one_power_too_few", ["forward", "gradient"], "range(terms - 2)", "range(terms - 3)"),
    _oft("takes_one_power_too_many", ["forward", "gradient"], "range(terms - 2)", "range(terms - 1)"),
    _oft("ignores_the_number_of_terms", ["forward"], "range(terms - 2)", "range(3)", values={**_USUAL, "terms": 4}),
    _oft("forgets_the_factor_in_front_of_the_series", ["forward", "gradient"],
        "return (identity + Q) @ series", "return series"),
    _oft("takes_the_series_for_the_exact_form", ["forward", "gradient"],
        'if cayley == "exact":', "if False:", values=_EXACT),
    _oft("takes_the_exact_form_for_the_series", ["forward", "gradient"], 'if cayley == "exact":', "if True:"),
    _oft("uses_the_first_block_for_all", ["forward", "gradient"], _ROTATE,
        'torch.einsum("...nk,nkc->...nc", x_TNK, self.rotation()[:1].expand(x_TNK.shape[-2], -1, -1))'),
    # Rotate numbers that lie apart instead of next to each other.
    _oft("interleaves_the_blocks", ["forward", "gradient"], "x_TNK = x_TD.unflatten(-1, (-1, self.size))",
        "x_TNK = x_TD.unflatten(-1, (self.size, -1)).mT"),
    _oft("detaches_the_series", ["gradient", "step"], "return (identity + Q) @ series",
        "return (identity + Q) @ series.detach()"),
    _oft("starts_with_a_rotation", ["initial", "identity"], "Q = torch.zeros(shape, dtype", "Q = torch.ones(shape, dtype"),
    _oft("stores_whole_blocks", ["parameters"], "size * (size - 1) // 2\n", "size * size\n"),
    _oft("takes_the_next_larger_divisor", ["parameters"],
        "return max(k for k in range(1, min(features, largest) + 1) if features % k == 0)",
        "return min(k for k in range(min(features, largest), features + 1) if features % k == 0)",
        values={"block_size": 7}),
]
# fmt: on
