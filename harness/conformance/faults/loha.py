"""Planted faults of LoHa."""

from __future__ import annotations

from functools import partial
from typing import Any

from harness.conformance.faults import FaultCase, line_fault, planted
from harness.conformance.faults.patched_copy import PatchedCopy

_USUAL = {"rank": 3, "alpha": 40.0}
_DROP = {**_USUAL, "rank_dropout": 0.25}
CASE = FaultCase(values=_USUAL)
_UPDATE = "self.scaling * ((self.B1 @ self.A1) * (self.B2 @ self.A2))"
_FACTORS = "A1, B1, B2 = (_uniform(*shape, generator).to(**like) for shape in ((R, D), (E, R), (E, R)))"
_MASK = "kept_E = torch.rand(len(delta_ED), dtype=torch.float32, device=delta_ED.device) >= self.p"
_SCALED = "return delta_ED * (kept_E / share).to(delta_ED.dtype)[:, None]"
_ONCE = """class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, A1, B1, A2, B2):
        ctx.save_for_backward(A1, B1, A2, B2)
        return (B1 @ A1) * (B2 @ A2)

    @staticmethod
    def backward(ctx, d):
        A1, B1, A2, B2 = ctx.saved_tensors
        with torch.no_grad():
            d1, d2 = d * (B2 @ A2), d * (B1 @ A1)
            return B1.T @ d1, d1 @ A1.T, B2.T @ d2, d2 @ A2.T


"""

_loha = partial(line_fault, "loha", values=_USUAL)
_rows = partial(line_fault, "loha", file="row_dropout", values=_DROP)

# fmt: off
FAULTS = [
    _loha("forgets_the_scaling", ["forward", "gradient", "merge"], _UPDATE, "(self.B1 @ self.A1) * (self.B2 @ self.A2)"),
    # Scale each of the two products.
    _loha("scales_twice", ["forward", "gradient", "merge"], _UPDATE, f"self.scaling * {_UPDATE}"),
    _loha("divides_by_the_root_of_the_rank", ["forward", "merge"],
        "config.scaling, config.rank_dropout", "config.alpha / config.rank**0.5, config.rank_dropout"),
    _loha("adds_the_products", ["identity", "forward", "gradient"], _UPDATE,
        "self.scaling * ((self.B1 @ self.A1) + (self.B2 @ self.A2))"),
    # Multiply the factors before the product, which has rank R instead of R^2.
    _loha("multiplies_the_factors_instead_of_the_products", ["forward", "gradient"], _UPDATE,
        "self.scaling * ((self.B1 * self.B2) @ (self.A1 * self.A2))"),
    _loha("pairs_the_factors_crosswise", ["forward", "gradient"], _UPDATE,
        "self.scaling * ((self.B1 @ self.A2) * (self.B2 @ self.A1))"),
    _loha("uses_the_first_product_twice", ["identity", "forward", "gradient"], _UPDATE,
        "self.scaling * ((self.B1 @ self.A1) * (self.B1 @ self.A1))"),
    # Apply the transposed update, which raises no error on a square layer.
    _loha("transposes_the_update", ["forward", "gradient"],
        "x_TD @ self.rank_dropout(self.delta()).T", "x_TD @ self.rank_dropout(self.delta())", inputs=32, outputs=32),
    _loha("does_not_sum_over_the_inputs_of_one_output", ["forward"], "x_TD @ self.rank_dropout(self.delta()).T",
        "(x_TD @ self.delta().T if len(self.delta()) > 1 else x_TD * self.delta())", outputs=1),
    _loha("detaches_the_second_product", ["gradient", "step"], _UPDATE,
        "self.scaling * ((self.B1 @ self.A1) * (self.B2 @ self.A2).detach())"),
    _loha("starts_with_a2_not_zero", ["initial", "identity"], "torch.zeros(R, D, **like)", "torch.ones(R, D, **like)"),
    # Start as LyCORIS does, where B2 is zero.
    _loha("starts_with_b2_zero_instead_of_a2", ["initial"],
        "base, A1, B1, A2, B2, config.scaling", "base, A1, B1, A1.clone(), B2 * 0, config.scaling"),
    _loha("starts_with_two_zero_factors", ["initial"], _FACTORS, f"{_FACTORS}\n        B2.zero_()"),
    _loha("starts_with_he_by_the_rows", ["initial"], "bound = columns**-0.5", "bound = rows**-0.5"),
    _loha("draws_the_two_products_alike", ["initial"], _FACTORS, f"{_FACTORS}\n        B2 = B1.clone()"),
    _loha("leaves_a_factor_out_of_its_tensors", ["parameters", "step"],
        '"A2": self.A2, "B2": self.B2}', '"B2": self.B2}'),
    _loha("halves_the_rank_of_each_product", ["parameters"],
        "base.in_features, config.rank", "base.in_features, -(-config.rank // 2)"),
    _rows("drops_no_row", ["rank_dropout"], "if not self.training or not self.p:", "if True:"),
    _rows("drops_rows_in_eval_mode", ["forward", "deterministic"],
        "if not self.training or not self.p:", "if not self.p:"),
    _rows("does_not_scale_the_rows_that_remain", ["rank_dropout"], _SCALED, "return delta_ED * kept_E[:, None]"),
    _rows("scales_by_the_probability_instead_of_the_share", ["rank_dropout"], _SCALED,
        "return delta_ED * (kept_E / (1 - self.p)).to(delta_ED.dtype)[:, None]"),
    _rows("drops_columns_instead_of_rows", ["rank_dropout"],
        _MASK, "kept_E = torch.rand(delta_ED.shape[1], device=delta_ED.device) >= self.p",
        _SCALED, "return delta_ED * (kept_E / share).to(delta_ED.dtype)"),
    _rows("drops_equally_many_rows_in_each_call", ["rank_dropout"],
        _MASK, "kept_E = torch.rand(len(delta_ED)).argsort() >= int(self.p * len(delta_ED))"),
    _rows("keeps_as_many_rows_as_it_should_drop", ["rank_dropout"], _MASK, _MASK.replace(">=", "<")),
    _rows("drops_the_same_rows_in_every_call", ["rank_dropout"], _MASK,
        "kept_E = torch.rand(len(delta_ED), generator=torch.Generator().manual_seed(0)) >= self.p"),
    _rows("loses_the_mask_in_the_backward_pass", ["rank_dropout"], _SCALED,
        "masked = delta_ED * (kept_E / share).to(delta_ED.dtype)[:, None]\n"
        "        return delta_ED + (masked - delta_ED).detach()"),
    _loha("cannot_differentiate_the_gradients_of_its_factors", ["calls"],
        "class LohaLinear(", _ONCE + "class LohaLinear(",
        _UPDATE, "self.scaling * Once.apply(self.A1, self.B1, self.A2, self.B2)"),
    _rows("makes_nan_if_no_row_remains", ["rank_dropout"], ".clamp(min=1 / len(delta_ED))", "",
        values={**_USUAL, "rank_dropout": 0.9}, outputs=1),
]
# fmt: on


@planted("loha", "merge", values=_DROP)
def merges_the_rank_dropout_of_training_mode(copy: PatchedCopy) -> None:
    """When merging, add the update with rank dropout applied, as in peft#3586."""
    copy.change_layers(merge_the_rank_dropout)


def merge_the_rank_dropout(layer: Any) -> None:
    """Change `layer.merged` so that in training mode it applies rank dropout to the update that it adds."""
    delta, dropout = layer.delta, layer.rank_dropout

    def merged() -> Any:
        layer.delta = lambda: dropout(delta())
        try:
            return type(layer).merged(layer)
        finally:
            del layer.delta

    layer.merged = merged
