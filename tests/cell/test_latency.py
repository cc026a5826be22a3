"""Latency: every variant is what it is called, whatever an implementation's own methods do; and short models too."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from harness.cell.measure import latency
from harness.conformance.subject import configure
from harness.errors import ImplementationError
from harness.methods.registry import discover
from harness.records.record import DECODED, Evaluation

VOCABULARY = 20
USUAL = Evaluation(items=0)


@pytest.fixture(autouse=True)
def _no_pass_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine any pass may be, and of slow ones there are fewer."""
    monkeypatch.setattr(latency, "SLOW_S", math.inf)


def llama(positions: int = 64) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=positions,
        )
    )  # fmt: skip


def encoder(config: Any, model: Any, positions: int) -> Any:
    return model(
        config(
            vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=positions,
        )
    )  # fmt: skip


def adapted(model: Any, targets: tuple[str, ...] = ("q_proj",)) -> Any:
    attach = discover().find("method", "lora", "reference")
    return attach(model, configure("lora", {"rank": 1, "targets": list(targets)}), torch.Generator())


def measure(it: Any, causal: bool = True, asked: Evaluation = USUAL, **how: Any) -> dict[tuple[str, str], Any]:
    return {(m.variant, m.kind): m for m in latency.measure(it, causal, VOCABULARY, "", asked, **how)}


@pytest.mark.parametrize(
    ("model", "causal", "target", "tokens"),
    [
        (lambda: llama(64), True, "q_proj", 32),
        (lambda: llama(20), True, "q_proj", 12),  # and 8 to decode
        (lambda: llama(9), True, "q_proj", 1),
        (
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=20, n_embd=8, n_layer=1, n_head=2)),
            True,
            "lm_head",
            12,
        ),
        (lambda: encoder(BertConfig, BertForSequenceClassification, 16), False, "query", 16),
        (lambda: encoder(RobertaConfig, RobertaForSequenceClassification, 16), False, "query", 14),
    ],
    ids=["long", "short", "shortest", "GPT-2", "BERT", "RoBERTa"],
)
def test_a_prompt_is_no_longer_than_the_model_can_read(
    model: Callable[[], Any], causal: bool, target: str, tokens: int
) -> None:
    measured = measure(adapted(model(), (target,)), causal)
    kinds = ("prefill", "decode") if causal else ("forward",)
    assert set(measured) == {(v, k) for v in ("base", "unmerged", "merged") for k in kinds}
    assert all(m.seconds and not m.because for m in measured.values())
    assert {m.tokens for (_, kind), m in measured.items() if kind != "decode"} == {tokens}


@pytest.mark.slow
@pytest.mark.parametrize(("passes", "prefill", "decode"), [(None, 12, 14), (6, 8, 14), (100, 100, 112)])
def test_as_many_prompts_and_passes_as_are_asked_for(passes: int | None, prefill: int, decode: int) -> None:
    """At least: in four blocks of equal size, of which two decode, eight tokens at a time; the first one warms up."""
    asked = Evaluation(items=0, prompt_batch=3, prompt_tokens=40, passes=passes)
    for (_, kind), m in measure(adapted(llama(64)), asked=asked).items():
        assert (m.batch, m.tokens) == (3, 8 if kind == "decode" else 40)
        assert len(m.seconds) == (decode if kind == "decode" else prefill)


def test_no_variant_comes_later_than_another_on_the_average() -> None:
    """Or a machine that slows down would make it slower."""
    it, seen = adapted(llama(64)), list[str]()
    kinds = {"base": "Linear", "unmerged": "LoraLinear"}
    merged, unmerge = it.merge, it.unmerge
    it.merge = lambda: (kinds.update(base="merged"), merged())
    it.unmerge = lambda: (kinds.update(base="Linear"), unmerge())

    def note(*_: object) -> None:
        layer = it.model.get_submodule("model.layers.0.self_attn.q_proj")
        now = "unmerged" if type(layer).__name__ == "LoraLinear" else "merged" if kinds["base"] == "merged" else "base"
        seen.extend([now] * (seen[-1:] != [now]))

    it.model.register_forward_pre_hook(note)
    measure(it)
    assert seen == ["unmerged", "merged", "base", "merged", "unmerged", "merged", "base", "merged", "unmerged"]


def test_no_room_to_decode_is_said_and_the_prompt_is_timed() -> None:
    measured = measure(adapted(llama(8)))
    for (_, kind), m in measured.items():
        assert bool(m.seconds) == (kind == "prefill")
        assert m.because == (
            "" if m.seconds else "the model has 8 positions, no room to decode 8 tokens after a prompt"
        )
    assert measured["base", "prefill"].tokens == 8


class Remembering(nn.Module):
    """A causal model that notes how many tokens it can see at each call; its cache is their number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.saw = nn.Parameter(torch.zeros(1)), list[int]()

    def answer(self, ids: torch.Tensor, before: int | None, name: str) -> Any:
        self.saw.append(ids.shape[1] + (before or 0))
        return SimpleNamespace(logits=torch.zeros(*ids.shape, VOCABULARY), **{name: self.saw[-1]})


class Present(Remembering):
    def forward(self, input_ids: Any, cache: Any = None, use_cache: bool = True) -> Any:
        return self.answer(input_ids, cache, "cache")


class Past(Remembering):
    def forward(self, input_ids: Any, past_key_values: Any = None, use_cache: bool = True) -> Any:
        return self.answer(input_ids, past_key_values, "past_key_values")


class Forgetful(Remembering):
    def forward(self, input_ids: Any, use_cache: bool = True) -> Any:
        return self.answer(input_ids, None, "cache")


@pytest.mark.parametrize("kind", [Present, Past])
def test_decoding_goes_on_from_the_cache_whatever_it_is_called(kind: type[Remembering]) -> None:
    model = kind()
    measured = measure(SimpleNamespace(model=model, can_merge=False), blocks=1)
    assert len(measured["base", "decode"].seconds) == DECODED - latency.WARMUP
    decoded, rest = model.saw[: DECODED + 1], model.saw[DECODED + 1 :]
    assert decoded == list(range(USUAL.prompt_tokens, USUAL.prompt_tokens + DECODED + 1))
    # Decoding has run the prompts once, so every later pass over them is timed.
    assert rest == [USUAL.prompt_tokens] * len(measured["base", "prefill"].seconds)


def test_a_model_without_a_cache_is_not_said_to_decode() -> None:
    measured = measure(SimpleNamespace(model=Forgetful(), can_merge=False), blocks=1)
    assert measured["base", "prefill"].seconds
    assert not measured["base", "decode"].seconds
    assert "takes no key-value cache" in measured["base", "decode"].because


def standing(model: nn.Module) -> Callable[[], str]:
    """Return a function that says what the model's adapted place holds."""
    return lambda: type(model.get_submodule("model.layers.0.self_attn.q_proj")).__name__


def test_a_detach_that_forgets_its_layers_is_measured_as_any(monkeypatch: pytest.MonkeyPatch) -> None:
    it = adapted(llama())
    here, plain_detach, original = standing(it.model), it.detach, dict(it.layers)
    wrapped = here()
    seen: list[str] = []
    forward = latency._forward
    monkeypatch.setattr(latency, "_forward", lambda *a: seen.append(here()) or forward(*a))

    def detach() -> None:
        plain_detach()
        it.layers.clear()

    it.detach = detach
    measured = measure(it, blocks=2)
    assert seen == [wrapped, *["Linear"] * 4, wrapped]  # unmerged, merged, base, and back
    assert len(measured["base", "prefill"].seconds) == len(measured["merged", "prefill"].seconds)
    assert it.layers == original
    assert here() == wrapped != "Linear"


def test_layers_that_were_forgotten_before_are_put_back() -> None:
    it = adapted(llama())
    layers, wrapped = dict(it.layers), standing(it.model)()
    it.detach()
    it.layers.clear()
    assert measure(it, layers=layers)["unmerged", "prefill"].seconds
    assert standing(it.model)() == wrapped


@pytest.mark.parametrize(
    ("method", "does", "message"),
    [
        ("detach", lambda: None, r"detach\(\) of reference\.\S+ left model.layers.0.self_attn.q_proj"),
        ("unmerge", lambda: None, r"unmerge\(\) of reference\.\S+ did not restore model.layers.0.self_attn.q_proj"),
        ("detach", lambda: {}["q"], r"detach\(\) of reference\.\S+ raised KeyError: 'q'"),
        ("merge", lambda: None.x, r"merge\(\) of reference\.\S+ raised AttributeError"),  # type: ignore[attr-defined]
    ],
)
def test_a_faulty_adapter_is_blamed(method: str, does: Callable[[], Any], message: str) -> None:
    it = adapted(llama())
    setattr(it, method, does)
    with pytest.raises(ImplementationError, match=f"the implementation is at fault, not the model: {message}"):
        measure(it)


def test_running_out_of_memory_is_not_blamed_on_the_adapter() -> None:
    it = adapted(llama())

    def merge() -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    it.merge = merge
    with pytest.raises(torch.OutOfMemoryError):
        measure(it)
