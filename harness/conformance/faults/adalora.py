"""Faults of AdaLoRA."""

from __future__ import annotations

from harness.conformance.faults import FaultCase, planted
from harness.conformance.faults.patched_copy import PatchedCopy

_USUAL = {"rank": 6, "target_rank": 2, "alpha": 8.0}
CASE = FaultCase(values=_USUAL)


@planted("adalora", "budget", values=_USUAL)
def lets_the_budget_fall_as_a_square(its: PatchedCopy) -> None:
    its.line("(end - step) ** 3 // (end - config.tinit) ** 3", "(end - step) ** 2 // (end - config.tinit) ** 2")


@planted("adalora", "budget", values=_USUAL)
def forgets_the_final_steps_in_the_budget(its: PatchedCopy) -> None:
    its.line(
        "    end = config.total_steps - config.tfinal\n    if step <= config.tinit",
        "    end = config.total_steps\n    if step <= config.tinit",
    )


@planted("adalora", "budget", values=_USUAL)
def stops_above_the_target(its: PatchedCopy) -> None:
    its.line("        return target\n", "        return target + 1\n")


@planted("adalora", "budget", values=_USUAL)
def prunes_one_step_late(its: PatchedCopy) -> None:
    its.line("step % config.delta_t == 0", "step % config.delta_t == 1")


@planted("adalora", "budget", values=_USUAL)
def does_not_put_on_the_mask(its: PatchedCopy) -> None:
    its.line("masked_fill_(~self.get_buffer", "masked_fill_(False & self.get_buffer")


@planted("adalora", "budget", values=_USUAL)
def keeps_the_least_important(its: PatchedCopy) -> None:
    its.line("descending=True", "descending=False")


@planted("adalora", "budget", values=_USUAL)
def adds_up_the_scores_of_a_triplet(its: PatchedCopy) -> None:
    """Add the scores of a triplet instead of averaging them, so that the wider side dominates."""
    its.line("s_B.mean(dim=0) + s_A.mean(dim=1)", "s_B.sum(dim=0) + s_A.sum(dim=1)")


@planted("adalora", "budget", values=_USUAL)
def leaves_the_uncertainty_out_of_the_score(its: PatchedCopy) -> None:
    its.line("return I_bar * U_bar", "return I_bar")


@planted("adalora", "budget", values=_USUAL)
def gives_each_layer_its_own_budget(its: PatchedCopy) -> None:
    its.line(
        "masks = largest_mask(torch.cat([layer.scores() for layer in layers]), budget(step, config, len(layers)))",
        "masks = torch.cat([largest_mask(layer.scores(), budget(step, config, 1)) for layer in layers])",
    )


@planted("adalora", "importance", values=_USUAL)
def takes_the_sensitivity_without_its_magnitude(its: PatchedCopy) -> None:
    its.line("return (w * grad).abs()", "return w * grad")


@planted("adalora", "importance", values=_USUAL)
def squares_the_sensitivity(its: PatchedCopy) -> None:
    its.line("return (w * grad).abs()", "return (w * grad).square()")


@planted("adalora", "importance", values=_USUAL)
def swaps_the_betas(its: PatchedCopy) -> None:
    its.line("observe(self.config.beta1, self.config.beta2)", "observe(self.config.beta2, self.config.beta1)")


@planted("adalora", "importance", values=_USUAL)
def measures_the_uncertainty_by_the_old_average(its: PatchedCopy) -> None:
    its.line(
        "            I_bar.copy_(smoothed(I_bar, I, beta1))\n            U_bar.copy_(uncertainty(U_bar, I, I_bar, beta2))",
        "            U_bar.copy_(uncertainty(U_bar, I, I_bar, beta2))\n            I_bar.copy_(smoothed(I_bar, I, beta1))",
    )


@planted("adalora", "forward", "gradient", values=_USUAL)
def squares_lambda(its: PatchedCopy) -> None:
    its.line("self.dropout(x_TD) @ (self.A * self.E).T", "self.dropout(x_TD) @ (self.A * self.E**2).T")


@planted("adalora", "forward", "gradient", values=_USUAL)
def forgets_its_scaling(its: PatchedCopy) -> None:
    its.line("self.base(x_TD) + self.scaling * (h_TR @ self.B.T)", "self.base(x_TD) + h_TR @ self.B.T")


@planted("adalora", "initial", values=_USUAL)
def starts_with_lambdas_of_one(its: PatchedCopy) -> None:
    its.line("E = torch.zeros(config.rank, 1,", "E = torch.ones(config.rank, 1,")


@planted("adalora", "regularizer", values=_USUAL)
def adds_nothing_to_the_loss(its: PatchedCopy) -> None:
    its.line("        if self.config.orthogonality == 0:", "        if True:")


@planted("adalora", "regularizer", values=_USUAL)
def keeps_only_p_orthogonal(its: PatchedCopy) -> None:
    its.line("for gram in (layer.B.T @ layer.B, layer.A @ layer.A.T)", "for gram in (layer.B.T @ layer.B,)")


@planted("adalora", "regularizer", values=_USUAL)
def forgets_gamma(its: PatchedCopy) -> None:
    its.line("return self.config.orthogonality * orthogonality(", "return 1.0 * orthogonality(")


@planted("adalora", "regularizer", values={**_USUAL, "regularization": "squared-sum"})
def takes_the_mean_of_norms_for_the_sum_of_squares(its: PatchedCopy) -> None:
    its.line('if form == "squared-sum":', 'if form == "":')
