"""Faults that are planted in every Method to which they apply."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from harness.conformance.faults import planted_in_methods
from harness.conformance.faults.patched_copy import PatchedCopy, Right


@planted_in_methods("targets")
def matches_the_end_of_a_name_without_its_dot(copy: PatchedCopy) -> None:
    copy.replace_line('ends = tuple(f".{name}" for name in names)', "ends = tuple(names)", "layers")


@planted_in_methods("targets")
def knows_an_output_layer_by_the_name_lm_head(copy: PatchedCopy) -> None:
    copy.replace_line("if m is not output and path.startswith(start)", 'if not path.endswith("lm_head")', "layers")


@planted_in_methods("strides")
def reads_a_view_as_if_it_were_contiguous(copy: PatchedCopy) -> None:
    copy.replace_forward(lambda _, x, right: right(x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride())))


@planted_in_methods("vector")
def turns_a_vector_into_a_matrix(copy: PatchedCopy) -> None:
    copy.replace_forward(lambda _, x, right: right(torch.atleast_2d(x)))


@planted_in_methods("poison")
def leaves_a_column_unwritten(copy: PatchedCopy) -> None:
    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        out = right(x)
        return out + unwritten(out) if out.numel() else out

    copy.replace_forward(forward)


def unwritten(like: Tensor) -> Tensor:
    """Return the content of a buffer that is never written: NaN while torch fills fresh memory with NaN, otherwise
    zeros.
    """
    fresh = torch.empty_like(like)
    return torch.where(fresh.isnan(), fresh, 0.0)


@planted_in_methods("model")
def passes_a_gradient_only_behind_another_layer(copy: PatchedCopy) -> None:
    """Compute gradients only if the input needs a gradient.

    The wrong code takes an input without gradient as a sign of inference. But the first layer gets such an input in
    training, too.
    """

    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        with torch.set_grad_enabled(x.requires_grad):
            return right(x)

    copy.replace_forward(forward)


@planted_in_methods("save")
def computes_differently_at_its_first_use(copy: PatchedCopy) -> None:
    """Return a wrong output at the first call. So the output depends on the number of calls, which no checkpoint
    contains.
    """

    def forward(layer: Any, x: Tensor, right: Right) -> Tensor:
        layer.used = getattr(layer, "used", 0) + 1
        return right(x) * (1.5 if layer.used == 1 else 1.0)

    copy.replace_forward(forward)


@planted_in_methods("save", only=["adalora", "pissa", "qlora", "vera"])
def shows_copies_of_its_state(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        state = adapted.state
        adapted.state = lambda: {name: tensor.clone() for name, tensor in state().items()}

    copy.change_adapted(change)


@planted_in_methods("detach", adds_layers=True)
def leaves_its_layers_behind(copy: PatchedCopy) -> None:
    copy.change_adapted(lambda adapted: setattr(adapted, "detach", lambda: None))


@planted_in_methods("dropout", dropout=0.25)
def drops_nothing(copy: PatchedCopy) -> None:
    copy.change_layers(lambda layer: setattr(layer, "dropout", nn.Identity()))


@planted_in_methods("base", "identity", adds_layers=False)
def changes_a_weight_when_it_is_attached(copy: PatchedCopy) -> None:
    copy.change_adapted(lambda adapted: adapted.layers["first"].weight.data.mul_(1.01))


@planted_in_methods("base", adds_layers=True)
def rounds_a_weight_that_it_does_not_adapt(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        weight = adapted.model.other.weight
        weight.data = weight.data.bfloat16().to(weight.dtype)

    copy.change_adapted(change)


@planted_in_methods("base", adds_layers=True)
def widens_a_weight_that_it_does_not_adapt(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        weight = adapted.model.other.weight
        weight.data = weight.data.double()

    copy.change_adapted(change)


@planted_in_methods("detach")
def detaches_more_than_its_layers(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        detach = adapted.detach

        def detach_and_scale() -> None:
            detach()
            adapted.model.other.weight.data.mul_(2)

        adapted.detach = detach_and_scale

    copy.change_adapted(change)


@planted_in_methods("detach", adds_layers=False)
def freezes_the_model_when_it_is_detached(copy: PatchedCopy) -> None:
    copy.change_adapted(lambda adapted: setattr(adapted, "detach", lambda: adapted.model.requires_grad_(False)))


@planted_in_methods("detach", adds_layers=True)
def leaves_its_merged_layers_behind(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        merge, detach = adapted.merge, adapted.detach

        def merge_for_good() -> None:
            merge()
            adapted.detach = lambda: None

        adapted.merge, adapted.detach = merge_for_good, detach

    copy.change_adapted(change)


@planted_in_methods("merge", adds_layers=True)
def lets_the_merged_weights_train(copy: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        merge = adapted.merge

        def merge_and_train() -> None:
            merge()
            for path in adapted.layers:
                adapted.model.get_submodule(path).requires_grad_(True)

        adapted.merge = merge_and_train

    copy.change_adapted(change)
