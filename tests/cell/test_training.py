"""Training: the loss against plain computations, the schedule, and what stops a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.assets import generated
from harness.assets.rows import LabelledRow
from harness.cell import outcomes
from harness.cell.evaluation.likelihood import CausalScorer
from harness.cell.training import loop, optimizers
from harness.cell.training.batches import Batch, Example, answer_examples, collate
from harness.cell.training.optimizers import MasterWeights
from harness.cell.weight_changes import UpdateTracker
from harness.conformance.comparison.tolerance_policies import exact, noise_floor
from harness.conformance.subject import configure
from harness.errors import UsageError
from harness.methods.registry import discover
from harness.records.record import Training
from support.small_encoder import EXAMPLES, Encoder, batches, nothing, setting


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generated.tiny_llama(path := tmp_path_factory.mktemp("tiny-llama"))
    return path


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


# The loss


def causal_batch(tokenizer: Any) -> Batch:
    texts = [
        ("the film is sweet and now warm =", 1),
        ("the plot is dull =", 2),
        ("the cast is ugly but still weak =", 3),
    ]
    rows = []
    for text, answer in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(set(ids)) > 3
        rows.append(Example(text, tuple(ids), 0, answer))
    return collate(rows, tokenizer.pad_token_id, "left")


def test_the_causal_loss_is_over_the_answers_tokens_alone(model: Any, tokenizer: Any) -> None:
    batch = causal_batch(tokenizer)
    losses = []
    for row, answer in enumerate(batch.answers):
        ids = batch.inputs["input_ids"][row][batch.inputs["attention_mask"][row].bool()]
        log_p = model(ids[None]).logits[0].log_softmax(-1)  # alone, without padding
        losses += [-log_p[i - 1, ids[i]] for i in range(len(ids) - answer, len(ids))]
    assert len(losses) == 6
    want = torch.stack(losses).mean()
    judged = noise_floor({"loss": loop.loss_of(model, batch)}, {"loss": want}, {"loss": want}, "float64")
    assert judged.passed, judged


def test_no_more_logits_are_computed_than_the_answers_need(model: Any, tokenizer: Any) -> None:
    shapes: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    batch = causal_batch(tokenizer)
    loop.loss_of(model, batch)
    loop.last_logits(model, batch.inputs, 1)
    vocabulary = model.config.vocab_size
    assert shapes == [(3, 4, vocabulary), (3, 1, vocabulary)]  # three answer tokens and the position before them


class NoKeep(nn.Module):
    """A causal model that knows no logits_to_keep."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, use_cache: bool) -> Any:
        return self.inner(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache)


def test_a_model_without_logits_to_keep_gives_the_same_loss(model: Any, tokenizer: Any) -> None:
    batch = causal_batch(tokenizer)
    want = {"loss": loop.loss_of(model, batch)}
    assert noise_floor({"loss": loop.loss_of(NoKeep(model), batch)}, want, want, "float64").passed


def test_the_encoders_loss_is_the_mean_cross_entropy() -> None:
    model, batch = Encoder().double(), collate(EXAMPLES[:6], 0, "right")
    log_p = [model(torch.tensor([e.tokens]), torch.ones(1, len(e.tokens))).logits.log_softmax(-1) for e in EXAMPLES[:6]]
    want = torch.stack([-lp[0, e.label] for lp, e in zip(log_p, EXAMPLES, strict=False)]).mean()
    judged = noise_floor({"loss": loop.loss_of(model, batch)}, {"loss": want}, {"loss": want}, "float64")
    assert judged.passed, judged


# The optimizer and the loop


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_the_learning_rate_rises_to_its_value_and_falls_to_zero(warmup: int) -> None:
    s = setting(Encoder(), warmup=warmup, lr=2.0)
    rates = []
    for _ in range(11):
        rates.append(s["optimizer"].param_groups[0]["lr"])
        s["optimizer"].step()
        s["schedule"].step()
    rising = [2.0 * (i + 1) / warmup for i in range(warmup)]
    falling = [2.0 * (10 - i) / (10 - warmup) for i in range(warmup, 11)]
    assert rates == rising + falling
    assert (max(rates), rates[10]) == (2.0, 0.0)
    assert min(rates[:10]) > 0


def test_the_head_has_a_learning_rate_of_its_own_and_is_stepped_once() -> None:
    model = Encoder()
    attach = discover().find("method", "full", "reference")
    adapted = attach(model, configure("full", {}), torch.Generator())
    head = list(model.head.parameters())
    for head_lr, want in ((0.5, 0.5), (None, 0.1)):
        optimizer, _ = optimizers.make(adapted, head, Training(steps=1, warmup=0, lr=0.1, head_lr=head_lr))
        groups = {id(p): g["initial_lr"] for g in optimizer.param_groups for p in g["params"]}
        assert groups == {id(model.embed.weight): 0.1} | {id(p): want for p in head}
        assert sum(len(g["params"]) for g in optimizer.param_groups) == 3


def test_a_methods_own_optimizer_is_given_the_head_too() -> None:
    model = Encoder()
    attach = discover().find("method", "full", "reference")
    adapted = attach(model, configure("full", {}), torch.Generator())
    head = list(model.head.parameters())
    own = torch.optim.SGD([model.embed.weight], lr=0.1)
    adapted.optimizer = lambda lr, weight_decay: own  # type: ignore[method-assign]
    optimizer, _ = optimizers.make(adapted, head, Training(steps=1, warmup=0, lr=0.1, head_lr=0.5))
    assert optimizer is own
    groups = {id(p): g["initial_lr"] for g in own.param_groups for p in g["params"]}
    assert groups == {id(model.embed.weight): 0.1} | {id(p): 0.5 for p in head}


def test_training_trains_and_keeps_raw_numbers() -> None:
    model, reported = Encoder(), []
    before = model.embed.weight.detach().clone()
    given = batches(10)
    samples = loop.train(batches=given, seed=0, report=lambda *said: reported.append(said), **setting(model))
    assert not torch.equal(model.embed.weight, before)
    assert [len(v) for v in vars(samples).values() if isinstance(v, list)] == [10] * 5
    assert samples.cpu_seconds > 0
    assert reported == list(enumerate(samples.losses, 1))
    assert samples.tokens == [b.real_tokens for b in given]
    assert samples.padded_tokens == [b.padded_tokens for b in given]
    assert min(samples.step_seconds) > 0
    assert all(p.grad is not None for p in model.parameters())  # the last step's, for the memory ledger


def test_the_recorded_loss_and_norm_are_of_before_the_step() -> None:
    model, given = Encoder(), batches(1)
    loss = loop.loss_of(model, given[0])
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    model.zero_grad()
    samples = loop.train(batches=given, seed=0, report=nothing, **setting(model))
    assert samples.losses == [loss.item()]
    want = {"norm": norm.double()}
    judged = noise_floor({"norm": torch.tensor(samples.gradient_norms[0])}, want, {"norm": norm}, "float32")
    assert judged.passed, judged


def test_a_rerun_gives_the_same_losses() -> None:
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)  # what ran before must not matter
        s = setting(Encoder(), "lora")
        s["adapted"].model.head.dropout.p = 0.5
        runs.append(loop.train(batches=batches(6), seed=5, report=nothing, **s).losses)
    assert runs[0] == runs[1]


def test_a_methods_own_term_is_trained_on_and_not_reported() -> None:
    s = setting(Encoder())
    weight = s["adapted"].model.embed.weight
    s["adapted"].regularizer = lambda: 1000 * weight.square().sum()
    (batch,) = batches(1)
    plain = loop.loss_of(Encoder(), batch).item()
    before = weight.detach().clone()
    assert loop.train(batches=[batch], seed=0, report=nothing, **s).losses == [plain]
    assert bool((weight.detach().abs() < before.abs()).all())  # also of words that the batch does not hold


def test_after_step_counts_from_one() -> None:
    s = setting(Encoder())
    steps: list[int] = []
    s["adapted"].after_step = steps.append
    loop.train(batches=batches(3), seed=0, report=nothing, **s)
    assert steps == [1, 2, 3]


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(scale: float) -> None:
    with pytest.raises(outcomes.Diverged, match="at step 1"):
        loop.train(batches=batches(3), seed=0, report=nothing, **setting(Encoder(scale)))


def test_divergence_says_what_came_before_and_what_to_do() -> None:
    s = setting(Encoder(), lr=0.25)
    s["adapted"].after_step = lambda step: s["adapted"].parameters()[0].data.fill_(float("nan")) if step == 2 else None
    seen: list[float] = []
    with pytest.raises(outcomes.Diverged) as caught:
        loop.train(batches=batches(4), seed=0, report=lambda step, loss: seen.append(loss), **s)
    said = str(caught.value)
    assert said.startswith("training diverged: loss nan and gradient norm nan at step 3; ")
    assert f"the loss of step 2 was {seen[-1]:.4g}" in said
    assert "the peak here is 0.25; lower `lr` or lengthen `warmup`" in said
    assert "float16" not in said
    assert "\n" not in said  # a Record keeps its first line


@pytest.mark.parametrize(("steps", "stopped_at"), [(3, 3), (2 * loop.ZERO_GRADIENT_STEPS, loop.ZERO_GRADIENT_STEPS)])
def test_a_gradient_of_zero_from_the_first_step_on_stops_the_run(steps: int, stopped_at: int) -> None:
    with pytest.raises(outcomes.Untrained, match=f"exactly zero up to step {stopped_at}: nothing is being trained"):
        loop.train(batches=batches(steps), seed=0, report=nothing, **setting(Encoder(0.0)))


@pytest.mark.parametrize("speaks_at", [1, loop.ZERO_GRADIENT_STEPS])
def test_one_batch_with_a_gradient_is_a_training(speaks_at: int) -> None:
    model = Encoder(0.0)
    model.register_forward_pre_hook(
        lambda *_: calls.append(1) or setattr(model, "scale", float(len(calls) == speaks_at))
    )
    calls: list[int] = []
    steps = 2 * loop.ZERO_GRADIENT_STEPS
    norms = loop.train(batches=batches(steps), seed=0, report=nothing, **setting(model)).gradient_norms
    assert [bool(norm) for norm in norms] == [step == speaks_at for step in range(1, steps + 1)]


def test_what_trains_as_adapter_and_as_head_counts_once_in_the_norm() -> None:
    s = setting(model := Encoder())
    s["head"] = list(model.head.parameters())
    assert {id(p) for p in s["head"]} <= {id(p) for p in s["adapted"].parameters()}
    samples = loop.train(batches=batches(1), seed=0, report=nothing, **s)
    want = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert samples.gradient_norms == pytest.approx([float(want)])


def test_no_gradient_at_all_stops_the_run() -> None:
    s = setting(Encoder(), "lora")
    trainable = s["adapted"].parameters()
    s["adapted"].detach()  # the model runs without what is being trained ...
    s["adapted"].model.embed.weight.requires_grad_(True)  # ... and something else has a gradient
    with pytest.raises(outcomes.Untrained, match="exactly zero"):
        loop.train(batches=batches(3), seed=0, report=nothing, **s)
    assert all(p.grad is None for p in trainable)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_method_sees_the_same_batches(method: str) -> None:
    seen: list[Tensor] = []
    model = Encoder()
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"].clone()), with_kwargs=True)
    loop.train(batches=batches(5), seed=0, report=nothing, **setting(model, method))
    want = [b.inputs["input_ids"] for b in batches(5)]
    assert exact(dict(enumerate(seen)), dict(enumerate(want))).passed  # type: ignore[arg-type]


def test_training_and_scoring_cut_a_prompt_at_the_same_place(model: Any, tokenizer: Any) -> None:
    scorer = CausalScorer(model, tokenizer, batch=2, max_tokens=4, report=nothing)
    prompt, answer = "the film is sweet and now warm =", " good"
    (example,) = answer_examples(
        [LabelledRow("r", prompt, 0)], lambda r: r.text, lambda r: [answer], scorer.encode_pair, 4
    )
    read: list[list[int]] = []
    model.register_forward_pre_hook(lambda m, a, kw: read.append(kw["input_ids"][0].tolist()), with_kwargs=True)
    context, ids = scorer.encode_pair(prompt, answer)
    scorer._loglikelihood_tokens([(("", ""), context, ids)])
    assert read == [list(example.tokens[:-1])]


# Sixteen bits


def test_the_optimizer_is_described_whole() -> None:
    s = setting(Encoder(), lr=2e-3, weight_decay=0.5, warmup=4)
    facts = optimizers.facts(s["optimizer"])
    json.dumps(facts, allow_nan=False)
    (group,) = facts["groups"]
    assert facts["name"] == "AdamW"
    assert {k: group[k] for k in ("lr", "betas", "eps", "weight_decay", "tensors")} == {
        "lr": 2e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.5, "tensors": 3,
    }  # fmt: skip
    half = setting(Encoder().half())["optimizer"]
    assert isinstance(half, MasterWeights)
    assert optimizers.facts(half)["master_weights"] == "float32"
    assert optimizers.facts(half)["groups"][0]["eps"] == 1e-8
    (note,) = loop.notes(half)
    assert "float32 master weights" in note
    assert "scaled by 1024" in note
    (note,) = loop.notes(setting(Encoder().bfloat16())["optimizer"])
    assert "scaled" not in note


def test_a_loss_that_rises_is_noted() -> None:
    optimizer = setting(Encoder())["optimizer"]
    (note,) = loop.notes(optimizer, [0.7, 0.6, 8.0, 9.0])
    assert note.startswith("the loss rose from 0.65 to 8.5 ")
    assert loop.notes(optimizer, [0.7, 0.6, 0.5, 0.4]) == []


def test_training_nothing_is_refused_with_a_hint(model: Any) -> None:
    adapted = discover().find("method", "frozen", "reference")(model, configure("frozen", {}), torch.Generator())
    with pytest.raises(UsageError, match="nothing of this model trains") as refused:
        optimizers.make(adapted, [], Training(steps=1, warmup=0, lr=0.1))
    assert "steps: 0" in refused.value.hint


def test_what_is_set_back_to_its_start_has_moved_and_what_never_left_it_has_not() -> None:
    """AdaLoRA prunes singular values back to the zero that they began at; a detached tensor stays where it was."""
    start = {"E": torch.zeros(3), "P": torch.ones(3), "detached": torch.ones(2)}
    movement = UpdateTracker(start, lambda tensor: tensor)
    for E, P in ((0.1, 1.0), (0.0, 1.5), (0.0, 1.5)):
        now = {"E": torch.full((3,), E), "P": torch.full((3,), P), "detached": torch.ones(2), "new": torch.ones(1)}
        movement.observe(lambda now=now: now)  # type: ignore[misc]
    assert movement.unchanged(now) == ["detached"]


def test_a_master_in_float32_moves_by_less_than_its_parameter_can_show() -> None:
    movement = UpdateTracker({"A": torch.ones(3, dtype=torch.bfloat16)}, lambda tensor: tensor)
    movement.observe(lambda: {"A": torch.ones(3)})
    assert movement.unchanged({"A": torch.ones(3)}) == ["A"]
    movement.observe(lambda: {"A": torch.full((3,), 1.0001)})
    assert movement.unchanged({"A": torch.ones(3)}) == []
