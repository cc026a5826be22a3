"""Every method of the installed peft, from the adapter_config.json that peft saves: it runs, or is refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from harness.cell.evaluation.likelihood import generate
from harness.cell.training import loop, optimizers
from harness.cell.training.batches import Batch, Example, collate
from harness.cell.unreferenced_method import attached_layers
from harness.conformance.cell_gate import parity_gate
from harness.conformance.comparison.observations import inference
from harness.conformance.subject import Original, Subject, configure
from harness.errors import Exit, ImplementationError, SuiteError, Unsupported, UsageError
from harness.methods.implementations.hf_peft import any_config
from harness.methods.implementations.hf_peft.any_config import any_method
from harness.methods.peft_config import KEY, AdapterConfigField
from harness.methods.peft_schema import peft_types
from harness.records.record import CheckResult, Outcome, Status, Training
from harness.suites import loader
from support.sandbox import ForkSandbox

VOCABULARY = 32
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.15,
}  # fmt: skip
VIRTUAL = {"num_virtual_tokens": 4}
NO_TARGETS: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING": VIRTUAL, "MULTITASK_PROMPT_TUNING": {**VIRTUAL, "num_tasks": 2}, "PREFIX_TUNING": VIRTUAL,
    "CARTRIDGE": VIRTUAL, "P_TUNING": {**VIRTUAL, "encoder_hidden_size": 16}, "TRAINABLE_TOKENS": {"token_indices": [3, 5]},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2}, "CPT": {"cpt_token_ids": [1, 2]}, "XLORA": {}, "SHADOW": {},
}  # fmt: skip
WANTED: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 12, "init_r": 4, "target_r": 2}, "C3A": {"block_size": 16}, "FOURIERFT": {"n_frequency": 50},
    "IA3": {"feedforward_modules": ["down_proj"]}, "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "VBLORA": {"vector_length": 16, "num_vectors": 16},
}  # fmt: skip
REFUSED = {"CPT": "its loss includes", "SHADOW": "its loss includes", "XLORA": "it mixes trained adapters"}
TEXTS = [Example(f"t{n}", tuple(3 + (n + 2 * i) % (VOCABULARY - 3) for i in range(4 + n)), n % 2, 2) for n in range(4)]


def saved(kind: str, folder: Path, **more: Any) -> dict[str, Any]:
    """Return the keys of the file that peft itself writes; a type that is not known here is tried with layers alone."""
    import peft

    keys = {**NO_TARGETS.get(kind, {"target_modules": ["q_proj", "down_proj"]}), **WANTED.get(kind, {}), **more}
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](task_type="CAUSAL_LM", **keys)
    config.save_pretrained(folder)
    read: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return read


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2)).eval()


def bert() -> Any:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(**SMALL)).eval()


def forward(model: Any) -> Tensor:
    texts = collate(TEXTS, 0, "left" if model.can_generate() else "right")
    if model.can_generate():
        return loop.last_logits(model, texts.inputs, 1)
    return model(**texts.inputs).logits  # type: ignore[no-any-return]


def attached(keys: dict[str, Any], model: Any) -> tuple[Subject, list[CheckResult]]:
    """Attach to a model and take it through the parity gate."""
    run = inference(model, forward)
    base_output, own, original = run(), list(model.parameters()), Original.of(model)
    config = configure("peft", {KEY: keys})
    adapted = any_method(model, config, torch.Generator().manual_seed(0))
    bases, _ = attached_layers(adapted, [])
    subject = Subject("peft", config, "float32", model, adapted, bases, own, original)  # type: ignore[arg-type]
    return subject, parity_gate.gate(subject, 0, run, base_output, forward=forward)


def trained(subject: Subject) -> list[str]:
    """Train two steps; return the names of what moved."""
    batches = [collate(TEXTS, 0, "left" if subject.model.can_generate() else "right")] * 2  # type: ignore[operator]
    if not subject.model.can_generate():  # type: ignore[operator]
        batches = [Batch(b.inputs, b.labels, (0,) * len(TEXTS), b.real_tokens, b.padded_tokens) for b in batches]
    before = {name: p.detach().clone() for name, p in subject.model.named_parameters()}
    optimizer, schedule = optimizers.make(subject.adapted, [], Training(steps=2, warmup=0, lr=1e-2))
    loop.train(subject.adapted, [], batches, optimizer, schedule, 0, lambda *_: None)
    return [name for name, p in subject.model.named_parameters() if not torch.equal(p, before[name])]


def failed(results: list[CheckResult]) -> list[str]:
    return [f"{result.check} {result.detail}" for result in results if result.outcome is Outcome.FAIL]


@pytest.mark.nightly
@pytest.mark.parametrize("kind", sorted(peft_types()))
def test_every_type_runs_or_is_refused(kind: str, tmp_path: Path) -> None:
    keys = saved(kind, tmp_path)
    problem = AdapterConfigField("dict", None).problem(keys)
    if kind in REFUSED:
        assert f"has peft_type {kind}, which is not supported: {REFUSED[kind]}" in problem
        return
    assert problem == ""
    subject, results = attached(keys, llama())
    assert failed(results) == []
    assert {"peft/reached/float32/warm", "peft/reload/float32/warm"} <= {
        result.check for result in results if result.outcome is Outcome.PASS
    }
    assert set(trained(subject)) == set(subject.adapted.tensors())
    assert sum(t.numel() for t in subject.adapted.saved().values()) > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING"])
def test_encoders_read_virtual_tokens_too(kind: str, tmp_path: Path) -> None:
    subject, results = attached({**saved(kind, tmp_path), "task_type": "SEQ_CLS"}, bert())
    assert failed(results) == []
    assert set(trained(subject)) == set(subject.adapted.tensors())


@pytest.mark.slow
def test_scaling_a_zero_bias_is_no_defect(tmp_path: Path) -> None:
    keys = {**saved("GLORA", tmp_path), "task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    model = bert()
    assert not any(module.bias.any() for module in model.modules() if isinstance(module, torch.nn.Linear))
    _, results = attached(keys, model)
    assert failed(results) == []


def test_an_adapter_of_the_head_is_reloaded_unchanged() -> None:
    keys = {"peft_type": "LORA", "r": 4, "target_modules": ["lm_head", "q_proj"]}
    _, results = attached(keys, llama())
    assert failed(results) == []


# ---- virtual tokens


def test_a_prompt_of_another_width_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ImplementationError, match="peft refuses this adapter_config"):
        any_method(
            llama(), configure("peft", {KEY: saved("PROMPT_TUNING", tmp_path) | {"token_dim": 24}}), torch.Generator()
        )


class Words:
    """A tokenizer of numbers, one a token."""

    pad_token_id, eos_token_id = 0, None

    def batch_decode(self, rows: Tensor, **_: Any) -> list[str]:
        return [" ".join(str(int(i)) for i in row) for row in rows]


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "CARTRIDGE"])
def test_virtual_tokens_are_prepended_once(kind: str, tmp_path: Path) -> None:
    """With a cache or without, alone or behind padding: a text has the same answer."""
    model = llama()
    plain = inference(model, forward)()
    adapted = any_method(model, configure("peft", {KEY: saved(kind, tmp_path)}), torch.Generator())
    virtual = inference(model, forward)()
    assert not torch.equal(virtual, plain)
    prompts = [list(text.tokens) for text in TEXTS]
    written = generate(model, Words(), prompts, [], 6, 4, lambda *_: None)
    for prompt, answer in zip(prompts, written, strict=True):
        ids = torch.tensor([prompt])
        for _ in range(6):
            logits = model(input_ids=ids, use_cache=False).logits
            assert logits.shape[1] == ids.shape[1]
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        assert answer == Words().batch_decode(ids[:, len(prompt) :])[0]
    adapted.detach()
    assert torch.equal(inference(model, forward)(), plain)
    assert type(model) is LlamaForCausalLM
    adapted.attach_again()  # type: ignore[attr-defined]
    assert torch.equal(inference(model, forward)(), virtual)


def test_a_prefix_with_checkpointing_is_rejected(tmp_path: Path) -> None:
    subject, _ = attached(saved("PREFIX_TUNING", tmp_path), llama())
    subject.model.gradient_checkpointing_enable()  # type: ignore[operator]
    with pytest.raises(UsageError, match="which gradient checkpointing drops"):
        trained(subject)


SUITE = """\
suite: virtual
title: Virtual tokens
matrix:
  - model: tiny-llama
    task: toy-sentiment
    implementation: hf-peft
    method: peft
    training: {steps: 3, batch: 4, max_tokens: MOST}
    evaluation: {items: 4}
    config: {adapter_config: ./adapter_config.json}
"""


@pytest.mark.parametrize(("kind", "refused"), [("PREFIX_TUNING", 1), ("CARTRIDGE", 1), ("PROMPT_TUNING", 0)])
def test_a_suite_that_checkpoints_a_prefix_is_refused(kind: str, refused: int, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, **VIRTUAL}), encoding="utf-8")
    (tmp_path / "suite.yaml").write_text(SUITE.replace("MOST}", "64, checkpointing: [false, true]}"), encoding="utf-8")
    messages = []
    try:
        loader.load(tmp_path / "suite.yaml")
    except SuiteError as error:
        messages = [p.what for p in error.problems if "in a cache, which checkpointing drops" in p.what]
    assert len(messages) == refused


def test_prompt_tuning_completes_a_run(fork_sandbox: ForkSandbox, tmp_path: Path) -> None:
    saved("PROMPT_TUNING", tmp_path)
    suite = tmp_path / "suite.yaml"
    suite.write_text(SUITE.replace("MOST", "254"), encoding="utf-8")
    refused = fork_sandbox.command("run", str(suite), "--out", "run")
    assert refused.code == Exit.USAGE
    assert (
        "suite.yaml:8: 4 virtual tokens, a text of 254 and an answer of 0 exceed the 256 positions of tiny-llama"
        in refused.err
    )
    suite.write_text(SUITE.replace("MOST", "24"), encoding="utf-8")
    finished = fork_sandbox.command("run", str(suite), "--out", "run")
    assert finished.code == Exit.PASS, finished.err
    (record,) = fork_sandbox.read().records
    assert record.status is Status.OK
    assert record.layers == []
    measured = record.measurements
    assert measured is not None
    assert measured.parameters.adapter == 4 * 64
    assert measured.memory is not None
    assert measured.memory.adapter_B == 4 * 64 * 4
    assert measured.checkpoint is not None
    assert 4 * 64 * 4 < (measured.checkpoint.adapter_file_B or 0) < 4 * 64 * 4 + 200
    assert measured.accuracy is not None
    assert len(measured.accuracy.items) == 4
    alone = [timed for timed in measured.latency if timed.adapters is None]
    because = {(timed.variant, timed.kind): (len(timed.seconds) > 0, timed.because) for timed in alone}
    assert because["base", "decode"] == because["unmerged", "decode"] == (True, "")
    assert because["merged", "decode"][1].endswith("virtual tokens are a part of the input, not of the weights")
    passed = {check.check.split("/")[1] for check in record.checks if check.outcome is Outcome.PASS}
    assert passed >= {"base", "reached", "reload", "frozen", "moved"}


# ---- starts that rewrite the base weight


def outcomes(results: list[CheckResult]) -> dict[str, Outcome]:
    return {result.check.split("/")[1]: result.outcome for result in results}


def test_olora_starts_as_the_base_with_other_weights(tmp_path: Path) -> None:
    keys = saved("LORA", tmp_path, init_lora_weights="olora", target_modules=["q_proj"])
    subject, results = attached(keys, llama())
    assert failed(results) == []
    assert outcomes(results)["start"] is outcomes(results)["base"] is Outcome.PASS
    path = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(subject.bases[path].weight, subject.original_base(path).weight)  # type: ignore[arg-type]


def test_a_weight_wrongly_changed_by_olora_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora.layer import LoraLayer

    model, right = llama(), LoraLayer.olora_init

    def wrong(layer: Any, name: str) -> None:
        right(layer, name)
        model.lm_head.weight.data[0, 0] += 1e-3

    monkeypatch.setattr(LoraLayer, "olora_init", wrong)
    _, results = attached(saved("LORA", tmp_path, init_lora_weights="olora", target_modules=["q_proj"]), model)
    assert outcomes(results)["base"] is Outcome.FAIL


def test_loftq_is_for_gpus_and_does_not_start_as_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora import layer

    keys = saved("LORA", tmp_path, init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1})
    monkeypatch.setattr(any_config, "_gpu", lambda: False)
    with pytest.raises(Unsupported, match="LoftQ quantises on a GPU"):
        attached(keys, llama())

    def on_a_cpu(weight: Tensor, num_bits: int, reduced_rank: int, num_iter: int) -> tuple[Tensor, Tensor, Tensor]:
        rounded = (weight.detach() * 8).round() / 8
        u, s, v = torch.linalg.svd(weight.detach() - rounded, full_matrices=False)
        return rounded, (s[:, None] * v)[:reduced_rank], u[:, :reduced_rank]

    monkeypatch.setattr(layer, "loftq_init", on_a_cpu)
    monkeypatch.setattr(any_config, "_gpu", lambda: True)
    _, results = attached(keys, llama())
    assert failed(results) == []
    assert outcomes(results)["start"] is Outcome.SKIPPED
    assert outcomes(results)["base"] is Outcome.PASS
