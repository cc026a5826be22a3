"""Faults of GaLore."""

from __future__ import annotations

from harness.conformance.faults import FaultCase, planted
from harness.conformance.faults.patched_copy import PatchedCopy

_USUAL = {"rank": 3}
CASE = FaultCase(values={**_USUAL, "eps": 0.1})
_WIDE = {"inputs": 40, "outputs": 36}  # wider than the sketch of a randomised SVD
_LOW = '{"rank": c.rank, "update_gap": c.update_gap, "scale": c.scale, "side": c.side, "niter": c.niter}'


@planted("galore", "refresh", values=_USUAL)
def projects_the_wrong_side(its: PatchedCopy) -> None:
    its.line('"std": (m < n, m >= n)', '"std": (m >= n, m < n)')


@planted("galore", "refresh", values=_USUAL)
def forgets_its_moments_at_a_refresh(its: PatchedCopy) -> None:
    its.line(
        "        fresh = given or",
        '        state |= {"M": state["M"] * 0, "V": state["V"] * 0} if state else {}\n        fresh = given or',
    )


@planted("galore", "refresh", values=_USUAL)
def starts_counting_anew_at_a_refresh(its: PatchedCopy) -> None:
    its.line(
        "    correction = math.sqrt(", '    state["step"] = (state["step"] - 1) % 2 + 1\n    correction = math.sqrt('
    )


@planted("galore", "refresh", values=_USUAL)
def refreshes_one_step_late(its: PatchedCopy) -> None:
    its.line('state.get("step", 0) % update_gap == 0', 'state.get("step", 0) % update_gap == (1 if state else 0)')


@planted("galore", "refresh", values=_USUAL)
def never_refreshes(its: PatchedCopy) -> None:
    its.line('state.get("step", 0) % update_gap == 0', "not state")


@planted("galore", "step", "refresh", values=_USUAL)
def forgets_the_scale(its: PatchedCopy) -> None:
    its.line("alpha=lr * (scale if rank else 1.0)", "alpha=lr")


@planted("galore", "step", "refresh", values=_USUAL)
def scales_plain_adam_too(its: PatchedCopy) -> None:
    its.line("alpha=lr * (scale if rank else 1.0)", "alpha=lr * scale")


@planted("galore", "step", "refresh", values=_USUAL)
def projects_the_weight_decay(its: PatchedCopy) -> None:
    its.line(
        "    basis = Projector(state.get",
        "    G, weight_decay = G + weight_decay * W, 0.0\n    basis = Projector(state.get",
    )


@planted("galore", "step", "refresh", values=_USUAL)
def scales_the_weight_decay(its: PatchedCopy) -> None:
    its.line("W.mul_(1 - lr * weight_decay)", "W.mul_(1 - lr * scale * weight_decay)")


@planted("galore", "step", "refresh", values=_USUAL)
def leaves_out_the_bias_correction(its: PatchedCopy) -> None:
    its.line('correction = math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])', "correction = 1.0")


@planted("galore", "refresh", values=_USUAL)
def takes_the_least_singular_vectors(its: PatchedCopy) -> None:
    its.line("Vh[:rank].T", "Vh[-rank:].T")
    its.line("U[:, :rank]", "U[:, -rank:]")


@planted("galore", "refresh", values={**_USUAL, "niter": 1}, **_WIDE)
def takes_the_exact_vectors_where_random_ones_are_asked_for(its: PatchedCopy) -> None:
    its.line("    if niter:", "    if False:")


@planted("galore", "refresh", values={**_USUAL, "niter": 1}, **_WIDE)
def iterates_once_more(its: PatchedCopy) -> None:
    its.line("old or Projector()), niter)", "old or Projector()), niter + 1)")


@planted("galore", "refresh", values={**_USUAL, "niter": 1}, **_WIDE)
def starts_each_refresh_at_random(its: PatchedCopy) -> None:
    its.line("old or Projector()", "Projector()")


@planted("galore", "gradient", values={**_USUAL, "train_rest": False})
def trains_the_rest_unasked(its: PatchedCopy) -> None:
    its.line("model.requires_grad_(config.train_rest)", "model.requires_grad_(True)")
