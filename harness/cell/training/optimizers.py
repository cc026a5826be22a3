"""The optimizer of a Cell: its class, groups and schedule, float32 master weights, and its description for the Record."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import harness.kernels.torch.optimizers.adamw8bit
import harness.kernels.torch.optimizers.paged
import reference.operations.adamw8bit
import reference.operations.paged
from harness.errors import Unsupported, UsageError
from harness.methods.spec import Adapted
from harness.records.record import Json, Optimizer, Training
from reference.shared.layerwise import Layerwise

SIXTEEN_BIT = (torch.float16, torch.bfloat16)
FIRST_LOSS_SCALE = 2.0**10
"""First value of the factor by which the loss is multiplied in float16. It is a power of two, so that scaling does not
round. With this factor, float16 represents gradients down to 6e-11."""


class MasterWeights(torch.optim.Optimizer):
    """An optimizer over float32 copies (masters) of its parameters.

    A step changes the masters. It then sets the parameters to the rounded masters. In float16, AdamW's eps of 1e-8 and
    the square of a small gradient become 0. In bfloat16, a step of a thousandth of a weight is lost to rounding.
    Float32 masters, as in mixed-precision training, avoid both errors. If other code writes to a parameter between two
    steps, the master adopts the new value. `state` includes the masters, so that the memory ledger counts them.

    inner: a new optimizer over the parameters; it now steps the masters instead. `loss_scale` is the factor by which
    the loss is multiplied before its backward pass; the gradients are divided by it again. If no parameter is float16,
    the factor is 1, and `scales` is False. `lower_loss_scale` halves the factor, which never grows again.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([dict(group) for group in inner.param_groups], dict(inner.defaults))
        self.inner = inner
        self._pairs: list[tuple[Tensor, Tensor]] = []
        for group, masters in zip(self.param_groups, inner.param_groups, strict=True):
            masters["params"] = [_master(p) for p in group["params"]]
            self._pairs += zip(group["params"], masters["params"], strict=True)
        self.scales = any(p.dtype == torch.float16 for p, _ in self._pairs)
        self.loss_scale = FIRST_LOSS_SCALE if self.scales else 1.0

    def master_of(self, parameter: Tensor) -> Tensor:
        """Return a parameter's master, or the parameter if it has none. Only masters show changes too small for 16 bits."""
        return next((m.detach() for p, m in self._pairs if p is parameter), parameter.detach())

    def lower_loss_scale(self) -> bool:
        """Halve the loss scale if a gradient is infinite or NaN. Return whether it was halved.

        A loss scale of 1 is not halved.
        """
        finite = [p.grad.isfinite().all() for p, _ in self._pairs if p.grad is not None]
        if self.loss_scale == 1.0 or not finite or bool(torch.stack(finite).all()):  # waits once for a GPU
            return False
        self.loss_scale /= 2
        return True

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Return a parameter's gradient in float32, divided by the loss scale. If it has no gradient, return None."""
        return None if parameter.grad is None else _wide(parameter.grad) / self.loss_scale

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step; `closure` is not used."""
        for group, masters in zip(self.param_groups, self.inner.param_groups, strict=True):
            masters["lr"] = group["lr"]  # the schedule writes to the outer groups
        stepped = [(p, master) for p, master in self._pairs if p.grad is not None]
        for p, master in stepped:
            master.grad = self.gradient(p)
            master.copy_(torch.where(p == master.to(p.dtype), master, p))  # if they differ, other code has written to p
        self.inner.step()
        for p, master in stepped:
            p.copy_(master)
            master.grad = None
        for p, master in stepped if self.state else self._pairs:
            self.state[p] = {"master": master, **self.inner.state[master]}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in SIXTEEN_BIT else tensor


def _master(parameter: Tensor) -> Tensor:
    return _wide(parameter.detach()).clone().requires_grad_(True)


BETAS, EPS = (0.9, 0.999), 1e-8
"""Betas and eps of AdamW, as in its paper and in torch today. They are set here, because torch may change its
defaults."""
PAGE_BUDGET_B = 0
"""Bytes of paged states that stay on the device between two steps. With 0, paging saves the most memory and is slowest."""
_OURS = (harness.kernels.torch.optimizers.adamw8bit.AdamW8bit, harness.kernels.torch.optimizers.paged.Paged)
_REFERENCES = (reference.operations.adamw8bit.AdamW8bit, reference.operations.paged.Paged)


def make(
    adapted: Adapted,
    head: Sequence[nn.Parameter],
    recipe: Training,
    name: Optimizer = "adamw",
    implementation: str = "",
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return the optimizer over adapter and head, and its schedule: linear warm-up, then a linear decrease to zero.

    If the Method has no optimizer of its own, `build` makes the optimizer. It gets float32 master weights if a trained
    tensor is float16 or bfloat16.

    If the Method has its own optimizer, this optimizer also steps the head. Its moments have 8 bits if `name` is
    `adamw-8bit`. It steps bfloat16 weights directly, as GaLore's paper does to save memory. For float16 weights it has
    float32 masters, because float16 cannot represent second moments.

    Raises UsageError if nothing trains, or if the Method cannot use `name` or `lr_ratio`. Raises Unsupported if an
    implementation's own optimizer has no moments in 8 bits.
    """
    heads = {id(p) for p in head}
    body = [p for p in adapted.parameters() if id(p) not in heads]
    if not body and not head:
        what = "nothing of this model trains: the method adds no tensors, and a causal model has no head to train"
        raise UsageError(what, hint="write `training: {steps: 0}`, or choose a method that trains")
    head_lr = recipe.lr if recipe.head_lr is None else recipe.head_lr
    of_head: list[dict[str, Any]] = [{"params": list(head), "lr": head_lr}] if head else []
    own = _own(adapted, recipe, name)
    if own is None:
        groups = [*_of_body(adapted, body, recipe), *of_head]
        optimizer = build(name, implementation, groups, recipe.lr, recipe.weight_decay)
        lacking = {*SIXTEEN_BIT}  # a second copy of float32 and float64 would be useless
    else:
        if name.startswith("paged-") or recipe.lr_ratio != 1:
            problem = (
                f"a paged `optimizer` or `lr_ratio` was chosen; {type(own).__name__}, the method's own, has neither"
            )
            raise UsageError(problem, hint="write `optimizer: adamw` or `adamw-8bit`, and leave `lr_ratio` out")
        for group in of_head:  # a Method's own optimizer has only the Method's tensors
            own.add_param_group(group)
        optimizer, lacking = own, {torch.float16}
    if lacking & {p.dtype for p in (*body, *head)}:
        optimizer = MasterWeights(optimizer)

    return optimizer, schedule(optimizer, recipe)


def schedule(optimizer: torch.optim.Optimizer, recipe: Training) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the schedule of a recipe: linear warm-up, then a linear decrease to zero."""

    def share(step: int) -> float:
        if step < recipe.warmup:
            return (step + 1) / recipe.warmup
        return max(0.0, (recipe.steps - step) / max(1, recipe.steps - recipe.warmup))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def _own(adapted: Adapted, recipe: Training, name: Optimizer) -> torch.optim.Optimizer | None:
    """Return the Method's own optimizer, or None if it has none. The moments have 8 bits if `name` requests 8 bits."""
    if not name.endswith("8bit"):
        return adapted.optimizer(recipe.lr, recipe.weight_decay)
    if "bits" in inspect.signature(adapted.optimizer).parameters:
        narrow: Any = adapted.optimizer
        return narrow(recipe.lr, recipe.weight_decay, bits=8)  # type: ignore[no-any-return]
    if (own := adapted.optimizer(recipe.lr, recipe.weight_decay)) is not None:
        raise Unsupported(f"{_class(own)}, the optimizer of this implementation, has no moments in 8 bits")
    return None


def layerwise(optimizer: torch.optim.Optimizer, recipe: Training) -> Layerwise | None:
    """If the recipe has layer-wise updates, make each backward pass update the weights from now on.

    Return the object that makes these updates, or None without layer-wise updates. Raises UsageError if a step needs
    several backward passes, or all gradients at once.
    """
    if not recipe.layerwise:
        return None
    if recipe.accumulate != 1:
        problem = f"`layerwise` frees each gradient within its backward pass, but `accumulate` is {recipe.accumulate}"
        raise UsageError(problem, hint="write `accumulate: 1`")
    if isinstance(optimizer, MasterWeights) and optimizer.scales:
        problem = (
            "`layerwise` frees each gradient before the others exist, but the loss scale of float16 needs all of them"
        )
        raise UsageError(problem, hint="write `dtype: bfloat16`")
    return Layerwise(optimizer, gradient_of(optimizer))


def gradient_of(optimizer: torch.optim.Optimizer) -> Callable[[Tensor], Tensor | None]:
    """Return a function that returns a parameter's gradient, divided by the loss scale."""
    return optimizer.gradient if isinstance(optimizer, MasterWeights) else lambda p: p.grad


def build(name: Optimizer, implementation: str, groups: Any, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return a new optimizer over `groups`.

    `adamw` is always torch's optimizer. Optimizers with 8-bit moments or paged states come from the reference in Cells
    of the implementation `reference`, and from harness/kernels in all other Cells. No Cell uses bitsandbytes'
    optimizers, because implementations with different optimizers would differ in more than their layers. bitsandbytes'
    optimizers are checked as Operations.
    """
    AdamW8bit, Paged = _REFERENCES if implementation == "reference" else _OURS
    kind = AdamW8bit if name.endswith("-8bit") else torch.optim.AdamW
    optimizer = kind(groups, lr=lr, betas=BETAS, eps=EPS, weight_decay=weight_decay)
    return Paged(optimizer, PAGE_BUDGET_B) if name.startswith("paged-") else optimizer


def _of_body(adapted: Adapted, body: Sequence[nn.Parameter], recipe: Training) -> list[dict[str, Any]]:
    """Return the parameter groups for `body`, the trained parameters of the Method, without the head.

    If `recipe.lr_ratio` is not 1 (LoRA+), the factors B and their biases c are a second group with another learning
    rate.
    """
    if recipe.lr_ratio == 1:
        return [{"params": list(body), "lr": recipe.lr}] if body else []
    faster = {id(tensor) for name, tensor in adapted.tensors().items() if name.rpartition(".")[2] in ("B", "c")}
    if not any(id(p) in faster for p in body):
        problem = f"`lr_ratio` is {recipe.lr_ratio:g}, but this method trains no factor B"
        raise UsageError(problem, hint="leave `lr_ratio` out")
    others, B = [p for p in body if id(p) not in faster], [p for p in body if id(p) in faster]
    return [{"params": others, "lr": recipe.lr}, {"params": B, "lr": recipe.lr * recipe.lr_ratio}]


def facts(optimizer: torch.optim.Optimizer) -> dict[str, Json]:
    """Return an optimizer's class, its paging and its parameter groups, as JSON. `lr` is the peak of the schedule."""
    groups: list[Any] = []
    for group in optimizer.param_groups:
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in group.items() if k != "params"}
        numbers = {k: v for k, v in plain.items() if isinstance(v, (bool, int, float, str, list))}
        numbers["lr"] = numbers.pop("initial_lr", numbers["lr"])
        groups.append({**numbers, "tensors": len(group["params"])})
    found: dict[str, Json] = {"name": type(_stepping(optimizer)).__name__, "class": _class(_stepping(optimizer))}
    if (paging := _paging(optimizer)) is not None:
        found |= {"paged_by": _class(paging), "page_budget_B": paging.budget}
    found["groups"] = groups
    if isinstance(optimizer, MasterWeights):
        found |= {"master_weights": "float32", "loss_scale": optimizer.loss_scale}
    return found


def stored_value(parameter: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """Return a parameter as the optimizer stores it: its master if it has one, or the parameter itself."""
    return optimizer.master_of(parameter) if isinstance(optimizer, MasterWeights) else parameter.detach()


def notes(optimizer: torch.optim.Optimizer) -> list[str]:
    """Return notes for the Record about arithmetic in 16 bits, states in 8 bits, and paged states."""
    sentences, states = [_note_on_16_bits(optimizer)], optimizer.state.values()
    narrow = sum(any(isinstance(v, Tensor) and v.dtype == torch.uint8 for v in state.values()) for state in states)
    if _has_8bit_moments(optimizer) and states:
        share = f"{narrow} of {len(states)} tensors that train"
        sentences.append(f"{share} have moments in 8 bits; those of fewer than 4096 elements have 32-bit moments")
    if (paging := _paging(optimizer)) is not None and states:
        count = len(paging.where())
        useless = "; on a CPU they move from memory to memory, which takes time and saves nothing"
        on_cpu = all(p.device.type == "cpu" for group in optimizer.param_groups for p in group["params"])
        share = f"states of {count} of {len(states)} tensors that train were paged, those of at least 100,000 elements"
        sentences.append(share + (useless if count and on_cpu else ""))
    return [sentence for sentence in sentences if sentence]


def _note_on_16_bits(optimizer: torch.optim.Optimizer) -> str:
    name = type(_stepping(optimizer)).__name__
    if not isinstance(optimizer, MasterWeights):
        halves = {p.dtype for group in optimizer.param_groups for p in group["params"]} & {*SIXTEEN_BIT}
        return (
            f"{name}, the Method's own, updates 16-bit weights directly: rounding drops small steps" if halves else ""
        )
    scaled = f", and the loss was scaled by {optimizer.loss_scale:g} for its backward pass" if optimizer.scales else ""
    stored = "master weights" if _has_8bit_moments(optimizer) else "master weights and moments"
    return f"{name} stored float32 {stored} for the trained 16-bit tensors{scaled}"


def _chain(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return an optimizer and the optimizers inside it, from the outside to the inside.

    The last optimizer computes the steps. Each optimizer around it adds master weights or paging.
    """
    inner = getattr(optimizer, "inner", None)
    return [optimizer, *(_chain(inner) if isinstance(inner, torch.optim.Optimizer) else [])]


def _stepping(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return _chain(optimizer)[-1]


def _paging(optimizer: torch.optim.Optimizer) -> Any:
    return next((one for one in _chain(optimizer) if isinstance(one, (_OURS[1], _REFERENCES[1]))), None)


def _has_8bit_moments(optimizer: torch.optim.Optimizer) -> bool:
    stepping = _stepping(optimizer)
    return isinstance(stepping, (_OURS[0], _REFERENCES[0])) or any(g.get("bits") == 8 for g in stepping.param_groups)


def _class(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__name__}"
