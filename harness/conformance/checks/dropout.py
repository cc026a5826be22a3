"""Check of dropout in training and eval mode.

A mask says which features of each token are dropped. p is the probability of dropping a feature.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from harness.conformance.case import Case
from harness.conformance.checks import States, check
from harness.conformance.comparison.call_forms import MODES, Call, Form, forms_without_gradients
from harness.conformance.comparison.call_histories import HISTORIES, is_packed
from harness.conformance.comparison.check_results import from_problems, skipped
from harness.conformance.comparison.inputs import inputs
from harness.conformance.comparison.layer_comparison import observe_with_reference, reference_runs
from harness.conformance.comparison.observations import observe, preserved_state
from harness.conformance.comparison.tolerance_policies import exact, noise_floor, rows_within
from harness.conformance.subject import DTYPES, Subject, initial_shapes, warm
from harness.conformance.tolerance_constants import DRAWS_AT_ONCE, DROPOUT_SIGMAS, DROPOUT_SURE_BITS, DROPOUT_SURE_SHARE
from harness.errors import Unsupported
from harness.methods.module_copy import copied
from harness.records.record import CheckResult

FEATURES = 32
"""Smallest number of features with which a correct mask drops some and retains others in nearly every token."""
TOKENS = 64
"""Smallest number of tokens in the check's input. A convolution gets this number of images, or fewer if it has many
channels (see `CHANNELS`)."""
CHANNELS = 4_096
"""Largest product of the number of images and the number of channels, unless this leaves fewer than `IMAGES` images. A
larger convolution in 16 bits takes minutes."""
IMAGES = 8
"""Smallest number of images with which a convolution is checked."""
MANY = 8_192
"""Number of tokens, all equal, in the input of `_share`."""
PLAIN = Form(lambda call: call.observe(call.x, call.dy))
"""Form of a plain call with gradients."""
_ALL_FORMS = {**MODES, **HISTORIES, **forms_without_gradients({})}
FORMS: dict[str, Form] = {
    name: _ALL_FORMS[name]
    for name in (
        "with an input that needs no gradient", "with frozen tensors", "under activation checkpointing",
        "under reentrant checkpointing", "in a second backward pass", "after calls of other sizes",
        "after earlier outputs were overwritten", "with hooks", "by a deep copy", "by a pickled copy",
        "by a copy that was in float64", "by functional_call", "under no_grad in training mode",
    )
}  # fmt: skip
"""Name -> form in which the layer runs in training mode. Most other forms change the number or layout of the tokens."""


@check(States.WARM)
def check_dropout(subject: Subject, case: Case) -> CheckResult:
    """Training mode drops features of the adapter's input as the config states; eval mode drops none.

    Each feature is dropped with probability p or scaled by 1/(1-p). The base gets all features, and the backward pass
    uses the mask of the forward pass. A mask must differ between tokens and between calls. It must not drop or retain
    all features of a wide token together. The random numbers need not equal the reference's.
    In float32, for the first layer if it takes rows, the check also tries rank 1, rank min(D, E), torch.compile and 13
    forms of a call (e.g. checkpointing, a deep copy). D and E are the numbers of the layer's input and output features.

    In the check's input, every token has only one feature that is not zero. The output must equal the reference's
    output with this feature either retained or dropped, which reveals the mask. The gradients must equal the
    reference's for this mask. The binomial distribution bounds the number of dropped features. For a convolution, an
    image is a token, and the middle pixel of a channel is the feature. For an embedding, dropout does nothing: training
    mode must give the same output as eval mode.
    """
    p = getattr(subject.config, "dropout", 0.0)
    if not p:
        return skipped(subject, case, "dropout", "the config has no dropout")
    problems: list[str] = []
    dropped, total, drops = 0, 0, False
    for index, (path, layer) in enumerate(subject.adapted.layers.items()):
        base, tokens = subject.original_base(path), max(case.tokens, TOKENS)
        images = max(IMAGES, min(TOKENS, CHANNELS // getattr(base, "in_channels", 1)))
        x, dy = inputs(base, tokens, DTYPES[subject.dtype], case.generator(index), images=images)
        if isinstance(base, nn.Embedding):
            problems += _changes(subject, path, layer, x, dy, case, training=True)
            continue
        drops = True
        only, where = _single(x, torch.randint(0, x.shape[1], (len(x),), generator=case.generator(index + 1)))
        # dy[:0] fits no output, so that no gradients are computed: `gradient` compares them in eval mode.
        problems += _changes(subject, path, layer, only, dy[:0], case, training=False)
        mine = observe(layer, subject.tensors_of(path), only, dy, training=True)
        seen = _RevealedMask(subject, case, path, p, only, dy, where)
        is_retained, is_dropped = seen.masks(mine["y"])
        if problem := seen.problem(mine, is_retained, is_dropped):
            problems.append(f"{path}: {problem}")
        if not bool((is_retained | is_dropped).all()):
            continue
        total += int((is_retained ^ is_dropped).sum())
        dropped += int((is_dropped & ~is_retained).sum())
        if bool((is_retained ^ is_dropped).all()):
            by_chance = (
                p ** x[0].numel() + (1 - p) ** x[0].numel()
            )  # share of tokens that a right mask treats as a whole
            rare = x[0].numel() >= FEATURES and by_chance < 0.25
            if rare and (whole := _whole_tokens(subject, path, layer, x, dy, p)) > len(x) // 2:
                problems.append(f"{path}: {whole} of {len(x)} tokens are retained or dropped as a whole")
            in_float32 = subject.dtype == "float32" and x.dim() == 2 and index == 0
            compiles = in_float32 or (x.dim() == 2 and case.walks > 0)
            problems += [f"{path}: {problem}" for problem in _repeats(subject, path, layer, p, compiles)]
            if x.dim() == 2 and index == 0:
                problems += [f"{path}: {problem}" for problem in _share(subject, path, layer, p)]
            if in_float32:
                problems += [f"{path} {problem}" for problem in _of_other_ranks(subject, case, path, p)]
                packed = path in subject.packed or is_packed(layer)
                call = Call(layer, subject.tensors_of(path), only, dy, training=True, is_packed=packed)
                problems += [f"{path} {problem}" for problem in _in_forms(seen, call)]
    spread = DROPOUT_SIGMAS * (total * p * (1 - p)) ** 0.5
    if drops and not total and not problems:
        return skipped(subject, case, "dropout", "in this state the adapter adds nothing")
    if not problems and abs(dropped - p * total) > spread + 1:
        problems.append(f"{dropped} of {total} features were dropped, should be {p * total:.0f} +- {spread:.0f}")
    detail = f"{dropped} of {total} features dropped at p = {p:g}" if drops else "an embedding drops nothing"
    return from_problems(subject, case, "dropout", problems, detail)


@dataclass(frozen=True)
class _RevealedMask:
    """Input with one nonzero feature per token, so that the layer's output shows which of these features were dropped."""

    subject: Subject
    case: Case
    path: str
    p: float
    x: Tensor
    dy: Tensor
    where: Tensor
    """Positions (T, 1) of the nonzero features in the flattened tokens."""

    def masks(self, y: Tensor) -> list[Tensor]:
        """Return two bool tensors (T,): whether the output y fits the reference's if the feature is retained, and if it
        is dropped. Both are True if the adapter adds nothing.
        """
        return _rows_as(self.subject, self.path, [y], self.x, (1 / (1 - self.p), 0.0))

    def problem(
        self, seen: dict[str, Tensor], is_retained: Tensor, is_dropped: Tensor, form: Form = PLAIN
    ) -> str | None:
        """Compare output and gradients with the reference's for the mask that the output shows.

        Return None if they agree, or if the output does not show the mask of every token. form: how the layer ran.
        """
        if neither := int((~(is_retained | is_dropped)).sum()):
            return f"{neither} of {len(self.x)} outputs fit neither a retained nor a dropped feature"
        if not bool((is_retained ^ is_dropped).all()):
            return None
        mask = is_retained.double().view(-1, *(1,) * (self.x.dim() - 1)) / (1 - self.p)
        truth, draws = reference_runs(self.subject, self.path, self.x, self.dy, run=partial(_masked, mask))
        names = form.shown(truth)

        def known(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
            """Return the tensors that the form gives, and `grad x` only at the nonzero features, whose mask is known."""
            found = {name: t for name, t in named.items() if name in names or named is seen}
            if "grad x" in found:
                found["grad x"] = found["grad x"].flatten(1).gather(1, self.where)
            return found

        factor = self.case.factor("gradient")
        verdict = noise_floor(known(seen), known(truth), map(known, draws), self.subject.dtype, factor)
        if verdict.decided and not verdict.passed:
            by = verdict.worst if verdict.error is None else f"is off by {verdict.error:.3g}"
            return f"with the forward pass's mask {verdict.tensor} {by}"
        return None


def _in_forms(revealed: _RevealedMask, call: Call) -> Iterator[str]:
    """Yield a message for each form of a call that uses another mask in the backward pass, or drops another share."""
    for name, form in FORMS.items():
        seen = form.run(call)
        if seen is None:
            continue
        is_retained, is_dropped = revealed.masks(seen["y"])
        tokens, dropped = len(is_dropped), int(is_dropped.sum())
        spread = DROPOUT_SIGMAS * (tokens * revealed.p * (1 - revealed.p)) ** 0.5 + 1
        if problem := revealed.problem(seen, is_retained, is_dropped, form):
            yield f"{name}: {problem}"
        elif abs(dropped - revealed.p * tokens) > spread:
            yield f"{name}: {dropped} of {tokens} features dropped, should be {revealed.p * tokens:.0f} +- {spread:.0f}"


def _changes(
    subject: Subject, path: str, layer: nn.Module, x: Tensor, dy: Tensor, case: Case, *, training: bool
) -> Iterator[str]:
    """Yield a message if a layer, in training or eval mode, differs from the reference without dropout."""
    runs = observe_with_reference(subject, path, layer, x, dy, training=training)
    found = noise_floor(*runs, subject.dtype, case.factor("forward"))
    if found.decided and not found.passed:
        mode = "training" if training else "eval"
        by = found.worst if found.error is None else f"is off by {found.error:.3g} of {found.allowed:.3g} allowed"
        yield f"{path}: in {mode} mode {found.tensor} {by}"


def _single(x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Return a copy of x with a single nonzero feature per token, and the positions (T, 1) of these features.

    A position is an index into the flattened token. features: index of the feature of each token. In an image it is the
    index of a channel, and the feature is the channel's middle pixel, because a convolution may skip other pixels.
    """
    size = x[0, 0].numel()
    where = (features * size + size // 2).view(-1, 1).to(x.device)
    flat = x.flatten(1)
    only = torch.zeros_like(flat).scatter(1, where, 1 + flat.abs().amax(1, keepdim=True))
    return only.view(x.shape), where


def _rows_as(subject: Subject, path: str, ys: Sequence[Tensor], x: Tensor, masks: Sequence[float]) -> list[Tensor]:
    """Compare the outputs `ys` with the reference's. Return one bool tensor (T,) per comparison: which rows agree.

    masks: factors. For each factor, the reference multiplies all features by it instead of dropping some. Every output
    is compared with the reference's output for every factor; the comparisons of the first output come first.
    """
    # x[:0] fits no output, so that no gradients are computed.
    truth, draws = reference_runs(subject, path, x, x[:0], run=partial(_masked_outputs, masks))
    own = list(islice(draws, DRAWS_AT_ONCE))

    def rows(named: Mapping[str, Tensor], name: str) -> Tensor:
        return named[name].flatten(1)

    return [
        rows_within(y.flatten(1), rows(truth, name), [rows(draw, name) for draw in own], subject.dtype)
        for y in ys
        for name in truth
    ]


def _masked_outputs(
    masks: Sequence[float], layer: nn.Module, tensors: Mapping[str, Tensor], x: Tensor, dy: Tensor
) -> dict[str, Tensor]:
    """Return the outputs of the reference's layer in training mode, one per factor in `masks`.

    The layer multiplies all features by the factor instead of dropping some.
    """
    return {f"y {number}": _masked(mask, layer, tensors, x, dy)["y"] for number, mask in enumerate(masks)}


def _whole_tokens(subject: Subject, path: str, layer: nn.Module, x: Tensor, dy: Tensor, p: float) -> int:
    """Return the number of tokens in which training mode retains all features or drops all features.

    Return 0 if rounding hides the difference, so that most tokens of the reference seem to be such tokens, too.
    """
    layers = layer, subject.reference(path, subject.dtype).layer
    ys = [observe(one, {}, x, dy, training=True)["y"] for one in layers]
    retained, dropped, own_retained, own_dropped = _rows_as(subject, path, ys, x, (1 / (1 - p), 0.0))
    hidden = int((own_retained | own_dropped).sum()) > len(x) // 2
    return 0 if hidden else int((retained | dropped).sum())


def _repeats(subject: Subject, path: str, layer: nn.Module, p: float, compiles: bool) -> Iterator[str]:
    """Yield a message if dropout uses the same mask for all tokens or for two calls.

    Also yield a message if two calls use different masks although torch has the same seed, with or without gradients.
    In the input, every token has one nonzero feature, and its position is the same in all tokens. compiles: whether to
    try torch.compile, too. Tokens in which rounding hides whether the feature was dropped are left out. Yield none if p is
    so near 0 or 1 that `MANY` tokens may all be treated alike, or if too few tokens are left.
    """
    bits = -math.log2(max(p, 1 - p))  # of one token; 0 if p is so small that 1 - p rounds to 1
    if bits * MANY < DROPOUT_SURE_BITS:
        return
    tokens = math.ceil(DROPOUT_SURE_BITS / bits)
    dtype, generator = DTYPES[subject.dtype], torch.Generator().manual_seed(0)
    x, dy = inputs(subject.original_base(path), tokens, dtype, generator, images=tokens)
    only, _ = _single(x, torch.zeros(len(x), dtype=torch.long))
    with torch.no_grad(), preserved_state(layer, {}, training=True):
        ys = [layer(only).clone() for _ in range(2)]  # no call of `train()` in between
        if compiles:
            torch.compiler.reset()
            ys.append(torch.compile(layer, backend="eager")(only).clone())
            torch.compiler.reset()
    fits = _rows_as(subject, path, ys, only, (1 / (1 - p), 0.0))
    sure = ~torch.stack([kept & lost for kept, lost in zip(fits[::2], fits[1::2], strict=True)]).any(0)
    retained = [kept[sure] for kept in fits[::2]]
    if int(sure.sum()) * bits < DROPOUT_SURE_SHARE * DROPOUT_SURE_BITS:
        return
    if bool(retained[0].all()) or not bool(retained[0].any()):
        yield f"a feature is retained or dropped in all of {tokens} tokens"
    elif len(ys) > 2 and (bool(retained[2].all()) or not bool(retained[2].any())):
        yield f"under torch.compile a feature is retained or dropped in all of {tokens} tokens"
    elif bool((retained[0] == retained[1]).all()):
        yield f"two calls drop the feature in the same of {tokens} tokens"
    else:
        with torch.random.fork_rng():
            seeded = []
            for _ in range(2):
                torch.manual_seed(0)
                seeded.append({"y": observe(layer, {}, only, dy, training=True)["y"]})
            torch.manual_seed(0)
            with torch.no_grad():
                without = observe(layer, {}, only, dy, training=True)["y"]
        again = _rows_as(subject, path, [seeded[0]["y"], without], only, (1 / (1 - p),))
        if not torch.equal(*(kept[sure] for kept in again)):
            yield "with the same seed of torch, a call under no_grad drops other features"
        if not exact(*seeded).passed:
            yield "two calls with the same seed of torch drop other features; activation checkpointing needs the same"


def _of_other_ranks(subject: Subject, case: Case, path: str, p: float) -> Iterator[str]:
    """Yield the messages of `_share` about new adapters of extreme ranks, for which a program may take another path.

    The ranks are 1 and min(D, E). Leave out a rank that the Method refuses with the other settings, as LoRA refuses
    rank 1 with init=orthogonal.
    """
    names = [f.name for f in fields(subject.config) if f.name.endswith("rank")]
    for rank in (1, min(subject.bases[path].get_parameter("weight").shape)) if names else ():
        bases = {one: copied(subject.original_base(one)) for one in subject.bases}  # attaching freezes them
        ranks = dict.fromkeys(names, rank)
        try:
            initial_shapes(subject.method, bases, replace(subject.config, **ranks), case.generator())
        except ValueError:
            continue
        try:
            fresh = case.attach_again(**ranks)
        except Unsupported:
            continue
        if fresh is not None:
            warm(fresh.added(), case.generator(salt=1))
            for problem in _share(fresh, path, fresh.adapted.layers[path], p):
                yield f"with rank={rank}: {problem}"


def _share(subject: Subject, path: str, layer: nn.Module, p: float) -> Iterator[str]:
    """Yield a message if the share of dropped tokens is not p, or if the mask repeats itself after some tokens.

    The layer runs in training mode on `MANY` equal tokens. A token has one nonzero feature, so that its output is one
    of two vectors: one if the feature is dropped, the other if not.
    """
    dtype, generator = DTYPES[subject.dtype], torch.Generator().manual_seed(0)
    x, dy = inputs(subject.original_base(path), 1, dtype, generator)
    one, _ = _single(x, torch.zeros(1, dtype=torch.long))
    run = partial(_masked_outputs, (1 / (1 - p), 0.0))
    retained, dropped = (y.double() for y in reference_runs(subject, path, one, dy[:0], run=run)[0].values())
    if torch.equal(retained, dropped):
        return
    ys = observe(layer, {}, one.expand(MANY, -1).contiguous(), dy[:0], training=True)["y"].double()
    mask = (ys - dropped).norm(dim=1) < (ys - retained).norm(dim=1)

    def differs(found: int, share: float, variance: float, of: int) -> str:
        spread = DROPOUT_SIGMAS * (of * variance) ** 0.5 + 1
        return f"should be {of * share:.0f} +- {spread:.0f}" if abs(found - of * share) > spread else ""

    if expected := differs(int(mask.sum()), p, p * (1 - p), MANY):
        yield f"{int(mask.sum())} of {MANY} tokens were dropped at p = {p:g}, {expected}"
        return
    alike = p**2 + (1 - p) ** 2
    # Two pairs that share a token are correlated: both are alike if all three tokens are.
    variance = alike * (1 - alike) + 2 * (p**3 + (1 - p) ** 3 - alike**2)
    for shift in (2**k for k in range(MANY.bit_length() - 1)):
        equal, pairs = int((mask[shift:] == mask[:-shift]).sum()), MANY - shift
        if expected := differs(equal, alike, variance, pairs):
            yield f"{equal} of {pairs} tokens are treated like the token {shift} places before, {expected}"
            return


def _masked(
    mask: Tensor | float, layer: nn.Module, tensors: Mapping[str, Tensor], x: Tensor, dy: Tensor
) -> dict[str, Tensor]:
    """Run the reference's layer in training mode, and return its output and gradients.

    The layer multiplies by `mask` instead of dropping features.
    """
    for name, child in list(layer.named_modules()):
        if isinstance(child, nn.Dropout | _Times):
            parent, _, last = name.rpartition(".")
            setattr(layer.get_submodule(parent), last, _Times(mask))
    return observe(layer, tensors, x, dy, training=True)


class _Times(nn.Module):
    """Layer that multiplies by a known mask. It replaces a dropout layer."""

    def __init__(self, mask: Tensor | float) -> None:
        super().__init__()
        self.p, self.mask = 0.5, mask

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.mask.to(x.dtype) if isinstance(self.mask, Tensor) else self.mask)
