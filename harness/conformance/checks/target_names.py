"""Check of the names and words by which a config selects layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from harness.conformance.case import Case
from harness.conformance.checks import States, check
from harness.conformance.checks.structure import structure_problems
from harness.conformance.comparison.check_results import from_problems, skipped
from harness.conformance.subject import DTYPES, Subject
from harness.records.record import CheckResult
from reference.shared.layers import features_in_out

_TARGETS = (
    ("proj",),
    ("block.proj",),
    ("extra_proj", "trunk.proj"),
    ("attention",),
    ("all-linear",),
    ("attention", "proj"),
)
"""Targets to try with a _NamedLayers."""


class _QueryAttention(nn.Module):
    """A block that the word `attention` selects, by the name of its class."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.query = nn.Linear(inputs, outputs)


class _NamedLayers(nn.Module):
    """Linear layers whose names are easily confused, in a trunk with an output layer, and a head beside the trunk.

    The output layer is not called `lm_head`, and the head not `classifier`.
    """

    base_model_prefix = "trunk"

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()

        def layer() -> nn.Linear:
            return nn.Linear(inputs, outputs)

        block = nn.ModuleDict({"proj": layer(), "block_proj": layer(), "proj_2": layer()})
        inner = {"extra_proj": layer(), "block": block, "proj": layer(), "vocabulary": layer()}
        self.trunk = nn.ModuleDict({**inner, "looks": _QueryAttention(inputs, outputs), "attention_free": layer()})
        self.scores = layer()

    @property
    def base_model(self) -> nn.Module:
        """The trunk, as in a model of transformers."""
        return self.trunk

    def get_output_embeddings(self) -> nn.Module:
        """Return the layer that computes the logits, as a model of transformers does."""
        return self.trunk["vocabulary"]


@check(States.INIT, depends_on_sizes=False, only_wide=True, also_in_typical_case=True)
def check_targets(subject: Subject, case: Case) -> CheckResult:
    """Names and words in `targets` select exactly the layers that the reference selects.

    A name is a whole path, or the end of a path after a dot: `proj` selects `block.proj`, but neither `extra_proj` nor
    `proj_2`. `attention` selects the linear layers in modules of a class named `...Attention`. `all-linear` selects the
    linear layers of the trunk, but no head and no layer that computes logits, whatever their names are.
    """
    if not hasattr(subject.config, "targets") or subject.packed or case.attach_fresh is None:
        return skipped(subject, case, "targets", "the config has no targets, or the case cannot attach again")
    if not isinstance(next(iter(subject.bases.values())), nn.Linear):
        return skipped(subject, case, "targets", "names are tried with linear layers")
    return from_problems(subject, case, "targets", [*_problems(subject, case)], f"{len(_TARGETS)} selections")


def _problems(subject: Subject, case: Case) -> Iterator[str]:
    sizes = features_in_out(next(iter(subject.bases.values())))
    for targets in _TARGETS:
        model = _NamedLayers(*sizes)
        with torch.no_grad():
            for index, parameter in enumerate(model.parameters()):
                parameter.normal_(generator=case.generator(salt=600 + index))
        model.to(subject.own[0].device, DTYPES[subject.dtype])
        fresh = case.attach_again(model=model, targets=targets)
        if fresh is not None:
            yield from (f"with targets={list(targets)}, {one}" for one in structure_problems(fresh))
