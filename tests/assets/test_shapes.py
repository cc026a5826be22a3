"""Models by shape alone: what suites may ask of them, how their weights come to be, and whole Cells of them."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.assets import conv1d, fetch, model_folder, shapes
from harness.assets.table import Source
from harness.cell import base_quantisation, lifecycle
from harness.cell.cell_run import CellRun
from harness.cell.job import Asset, Job, JobTask
from harness.cell.measure import latency
from harness.cell.measure.memory import PeakMeter
from harness.cell.measure.phases import PhaseClock
from harness.cell.outcomes import NonconformingError, Untrained
from harness.cell.training import loop, optimizers, random_model
from harness.conformance.subject import PackedLayer
from harness.conformance.tolerance_constants import FOOTPRINT_LEDGER
from harness.errors import AssetError, Exit, SuiteError
from harness.memory_model.cell_prediction import predict
from harness.methods.registry import Implementation, discover
from harness.records.record import AssetUse, Base, Cell, Evaluation, Measurements, Outcome, Status, Training
from harness.suites import loader
from harness.suites.schema import SYNTHETIC
from support.sandbox import ForkSandbox

# Rows of whole blocks of 64: bitsandbytes decodes others wrongly on some CPUs, which is another test's matter.
TINY = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
ROBERTA = {
    "model_type": "roberta", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1,
}  # fmt: skip
DEBERTA = {
    "model_type": "deberta-v2", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "type_vocab_size": 0, "relative_attention": True,
    "position_buckets": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": "p2c|c2p",
    "position_biased_input": False, "conv_kernel_size": 3, "conv_act": "gelu",
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 256, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64}
MIXTRAL = {**TINY, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
LAYERS = {
    "gpt2": ["c_attn", "c_fc"], "mixtral": ["q_proj", "v_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"], "roberta": ["query", "value", "intermediate.dense"],
    "deberta-v2": ["query_proj", "value_proj", "intermediate.dense"],
}  # fmt: skip
CPU = torch.device("cpu")
DENSE = Base()
SUITE = """\
suite: shapes
title: Of shapes
sources:
  - {{name: tiny-shape, kind: causal, source: "shape:./tiny.json"}}
matrix:
  - model: {model}
    task: {task}
    dtype: bfloat16
    training: {{steps: 4, batch: 2, max_tokens: 32, lr: 1e-3}}
    {more}
    cells:
      - id: packed
        method: lora
        implementation: fused
        base: {{quantization: nf4-dq, implementation: fused}}
        config: {{rank: 4, alpha: 8, targets: [q_proj, v_proj, down_proj]}}
      - {{id: full, method: full}}
"""


def written(folder: Path, model: str = "tiny-shape", task: str = SYNTHETIC, more: str = "", config: Any = TINY) -> Path:
    (folder / "tiny.json").write_text(json.dumps(config), encoding="utf-8")
    path = folder / "shapes.yaml"
    path.write_text(SUITE.format(model=model, task=task, more=more), encoding="utf-8")
    return path


def mistakes(path: Path) -> list[str]:
    with pytest.raises(SuiteError) as caught:
        loader.load(path)
    return [str(problem) for problem in caught.value.problems]


# ---- what a suite may say


@pytest.mark.parametrize(
    "config",
    [
        MIXTRAL | {"num_experts_per_tok": 4},
        MIXTRAL | {"num_local_experts": 0, "num_experts_per_tok": 0},  # a dense model of a type that may have experts
        MIXTRAL | {"num_experts_per_tok": None},
    ],
)
def test_a_routing_that_works_is_accepted(config: dict[str, Any]) -> None:
    model_folder.refuse_routing(config, "tiny", "tiny.json")


def test_a_folder_whose_tokens_reach_no_expert_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL | {"num_experts_per_tok": 0}), encoding="utf-8")
    with pytest.raises(AssetError, match="`num_experts_per_tok` is 0") as caught:
        model_folder.check(tmp_path, Source(name="tiny", kind="causal", source="shape:./config.json"))
    assert caught.value.hint == "write a number from 1 to 4 as `num_experts_per_tok`"


@pytest.mark.parametrize("model", ['"shape:llama-7b"', '"shape:./tiny.json"', "tiny-shape"])
def test_a_suite_names_a_preset_or_a_file(model: str, tmp_path: Path) -> None:
    cells = loader.load(written(tmp_path, model)).plan.cells
    assert [(cell.model, cell.evaluation.items) for cell in cells] == [(model.strip('"'), 0)] * 2


def test_what_does_not_go_with_a_shape_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    found = mistakes(written(tmp_path, "[tiny-shape, 'shape:lama-7b']", "toy-sentiment", "evaluation: {items: 4}"))
    assert [text.partition(": ")[0].rpartition(":")[2] for text in found] == ["6", "6"]
    assert any("no shape is called `lama-7b`" in text and "did you mean `llama-7b`" in text for text in found)
    assert any("has no tokenizer" in text and "write `task: synthetic`" in text for text in found)


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"more": "evaluation: {items: 4}"}, "`synthetic` is never scored"),
        ({"task": "[synthetic, toy-sentiment]"}, "`synthetic` is never scored"),
        ({"config": {}}, "names no `model_type`"),
        ({"model": '"shape:./nowhere.json"'}, "cannot read its config.json"),
        (
            {"config": MIXTRAL | {"num_experts_per_tok": 0}},
            "`num_experts_per_tok` is 0, and a token needs 1 to 4 experts",
        ),
        (
            {"config": MIXTRAL | {"num_experts_per_tok": 5}},
            "`num_experts_per_tok` is 5, and a token needs 1 to 4 experts",
        ),
    ],
)
def test_one_mistake(asked: dict[str, Any], what: str, tmp_path: Path) -> None:
    (found,) = mistakes(written(tmp_path, **asked))
    assert what in found
    assert "shapes.yaml:" in found


def test_accuracies_that_nobody_measures_cannot_be_compared(tmp_path: Path) -> None:
    path = written(tmp_path)
    asks = "comparisons: [{better: packed, than: full, says: something}]\n"
    path.write_text(path.read_text() + asks, encoding="utf-8")
    assert all("`better` compares accuracies" in text for text in mistakes(path))


# ---- weights


def folder_of(config: Any, tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


def dense(model: Any) -> int:
    """Count the linear weights that are there and not packed, outside the output layer."""
    return sum(
        m.weight.numel()
        for path, m in model.named_modules()
        if type(m) is torch.nn.Linear and path != "lm_head" and m.weight.device.type != "meta"
    )


def test_a_packed_shape_never_exists_in_its_first_form(tmp_path: Path) -> None:
    deep = TINY | {"num_hidden_layers": 6}
    model, registry = random_model.build(folder_of(deep, tmp_path), torch.bfloat16), discover()
    paths = [p for p, m in model.named_modules() if type(m) is torch.nn.Linear and p != "lm_head"]
    block = sum(m.weight.numel() for p, m in model.named_modules() if p in paths) // 6
    most, alive, held, pack = [], [], list[Any](), registry.find("base", "nf4", "fused")

    class Watched:
        def find(self, *_: str) -> Any:
            def packs(model: Any, here: list[str], dtype: torch.dtype) -> Any:
                most.append(dense(model))
                alive.append(sum(one() is not None for one in held))
                held.append(weakref.ref(model.get_submodule(here[0]).weight))
                return pack(model, here, dtype)

            return packs

    base = Base(quantization="nf4", implementation="fused")
    found = base_quantisation.pack(model, paths, base, torch.bfloat16, Watched(), random_model.drawn(model, CPU))  # type: ignore[arg-type]
    assert set(found.forms) == set(paths)
    assert max(most) == block
    assert max(alive) <= 1  # nobody else keeps what was packed: at most the one just replaced is still to be freed
    assert not any(t.device.type == "meta" for t in (*model.parameters(), *model.buffers()))
    # The same numbers as without a base: a Cell's base must not be another model.
    whole = random_model.build(tmp_path, torch.bfloat16)
    random_model.draw(whole, CPU)
    again = base_quantisation.pack(whole, paths, base, torch.bfloat16, registry)
    for path, form in again.forms.items():
        assert torch.equal(form.data, found.forms[path].data)
    assert torch.equal(whole.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        TINY | {"tie_word_embeddings": True},
        {"model_type": "gpt2", "vocab_size": 256, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ],
    ids=["llama", "tied", "gpt2"],
)
def test_weights_are_spread_as_the_models_own(config: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    check_spread(config, random_model.build(folder_of(config, tmp_path), torch.float32), AutoModelForCausalLM)


@pytest.mark.parametrize("config", [ROBERTA, DEBERTA], ids=["roberta", "deberta"])
def test_so_are_those_of_encoders(config: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    config = config | {"type_vocab_size": 8}  # of one row alone the spread is anything
    folder = folder_of(config | {"id2label": {"0": "A"}, "label2id": {"A": 0}}, tmp_path)
    model = random_model.build(folder, torch.float32, "encoder", labels=9)
    check_spread(config | {"num_labels": 9}, model, AutoModelForSequenceClassification)


def check_spread(config: Any, model: Any, factory: Any) -> None:
    from transformers import CONFIG_MAPPING

    random_model.draw(model, CPU)
    facts = {k: v for k, v in config.items() if k != "model_type"}
    torch.manual_seed(0)
    own = factory.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(facts))
    conv1d.as_linear(own)
    assert {n: t.shape for n, t in model.named_parameters()} == {n: t.shape for n, t in own.named_parameters()}
    for (name, mine), other in zip(model.named_parameters(), own.parameters(), strict=True):
        ratio = float(mine.detach().square().mean().sqrt() / other.detach().square().mean().sqrt().clamp(min=1e-9))
        assert ratio == 0 if not other.any() else 0.8 < ratio < 1.25, name
    for mine, other in zip(model.buffers(), own.buffers(), strict=True):
        assert torch.equal(mine, other)


def test_a_model_in_float64_has_the_weights_of_float32(tmp_path: Path) -> None:
    made = [random_model.build(folder_of(MIXTRAL, tmp_path), dtype) for dtype in (torch.float64, torch.float32)]
    for model in made:
        random_model.draw(model, CPU)
    wide, usual = (dict(model.named_parameters()) for model in made)
    assert {tensor.dtype for tensor in wide.values()} == {torch.float64}
    assert all(torch.equal(wide[name], tensor.double()) for name, tensor in usual.items())


def test_what_no_initialiser_sets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model.build(folder_of(TINY, tmp_path), torch.float32)
    model.model.layers[0].mlp.register_parameter("gate", torch.nn.Parameter(torch.empty(3, device="meta")))
    with pytest.raises(AssetError, match=r"no initialiser for model\.layers\.0\.mlp\.gate"):
        random_model.draw(model, CPU)


# ---- whole Cells


def lived(
    tmp_path: Path, method: str, base: Base = DENSE, implementation: str = "reference", config: Any = TINY,
    seed: int = 0, latency: bool = True,
) -> tuple[CellRun, Measurements]:  # fmt: skip
    """Live a Cell of a shape in this process."""
    ranks = {} if method in ("full", "frozen") else {"rank": 4, "targets": LAYERS[config["model_type"]]}
    ranks |= {"target_rank": 2} if method == "adalora" else {}
    cell = Cell(
        model="tiny-shape", task=SYNTHETIC, method=method, implementation=implementation, config=ranks, base=base,
        dtype="bfloat16", seed=seed, training=Training(steps=2, batch=2, max_tokens=32),
        evaluation=Evaluation(items=0, latency=latency),
    )  # fmt: skip
    use = AssetUse(name="tiny-shape", source="shape:tiny")
    kind: Any = "encoder" if config in (ROBERTA, DEBERTA) or "architectures" in config else "causal"
    source = Source(name="tiny-shape", kind=kind, source="shape:./config.json")
    task = JobTask(name=SYNTHETIC, spec={}, labels=2, test=0, shuffle_seed=0, use=use)
    work = Job(
        run="r", folder="f", attempt=1, cell=cell, data=None, task=task, device="cpu", launched=0.0,
        model=Asset(path=str(folder_of(config, tmp_path)), source=source, use=use),
    )  # fmt: skip
    meter = PeakMeter(CPU)
    life = CellRun(work, discover(), PhaseClock(meter, lambda _: None), meter, lambda *_, **__: None, baseline_B=0)
    return life, lifecycle.measure(life, predict)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "base"),
    [
        ("lora", DENSE),
        ("lora", Base(quantization="nf4", implementation="bitsandbytes")),
        ("qlora", DENSE),
        ("galore", DENSE),
    ],
    ids=str,
)
def test_a_cell_of_a_shape_measures_cost_and_scores_nothing(method: str, base: Base, tmp_path: Path) -> None:
    life, found = lived(tmp_path, method, base)
    assert found.accuracy is None
    assert found.training is not None
    assert found.training.tokens == found.training.padded_tokens == [2 * 32] * 2
    assert not [check.check for check in life.checks if check.outcome is Outcome.FAIL]
    assert any("the weights are random" in note for note in life.notes)
    assert any(one.seconds for one in found.latency)
    whole = random_model.build(folder_of(TINY, tmp_path), torch.bfloat16).state_dict().values()
    assert found.checkpoint is not None
    assert found.checkpoint.model_B == 2 * sum(tensor.numel() for tensor in whole)
    expected = found.memory.predicted
    assert expected is not None
    assert expected.adapter_B == found.memory.adapter_B
    assert expected.gradients_B == found.memory.gradients_B
    # The references of QLoRA keep the weight beside its codes, for `detach`: a prediction of what is needed shows it.
    near = abs(expected.weights_B - found.memory.weights_B) <= FOOTPRINT_LEDGER * found.memory.weights_B
    assert near == (method != "qlora")


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("config", "method", "base"),
    [
        (ROBERTA, "lora", Base(quantization="nf4-dq", implementation="fused")),
        (DEBERTA, "lora", DENSE),
    ],
    ids=["roberta-packed", "deberta"],
)
def test_a_cell_of_an_encoders_shape_trains_its_new_head_on_random_labels(
    config: Any, method: str, base: Base, tmp_path: Path
) -> None:
    life, found = lived(tmp_path, method, base, config=config, latency=config is DEBERTA)
    assert found.accuracy is None
    assert found.training is not None
    assert found.training.tokens == found.training.padded_tokens == [2 * 32] * 2
    assert "the labels, which are random too" in found.training.text_rules
    assert not [check.check for check in life.checks if check.outcome is Outcome.FAIL]
    timed = {(one.kind, one.variant) for one in found.latency if one.seconds}
    assert timed >= {("forward", "base"), ("forward", "unmerged")} or config is not DEBERTA
    head = 64 * 64 + 64 + 2 * 64 + 2
    assert found.parameters.head == head
    expected = found.memory.predicted
    assert expected is not None
    assert (expected.adapter_B, expected.gradients_B) == (found.memory.adapter_B, found.memory.gradients_B)
    assert abs(expected.weights_B - found.memory.weights_B) <= FOOTPRINT_LEDGER * found.memory.weights_B
    assert expected.activations_B is None


@pytest.mark.slow
def test_the_new_head_of_a_shape_starts_from_the_cells_seed(tmp_path: Path) -> None:
    packed = Base(quantization="nf4", implementation="fused")
    one, other = (
        lived(tmp_path, "frozen", base, config=ROBERTA, seed=seed, latency=False)[1].training
        for seed, base in ((1, DENSE), (2, packed))
    )
    assert one is not None
    assert other is not None
    assert one.initial_state_sha256 != other.initial_state_sha256


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pissa", "galore"])
def test_what_a_large_model_does_not_train_is_noticed(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its start there is no copy then."""
    from harness.conformance import subject

    make = optimizers.make
    monkeypatch.setattr(subject, "LARGEST_COPY", 1000)
    monkeypatch.setattr(
        optimizers, "make", lambda a, h, recipe, *more: make(a, h, recipe.model_copy(update={"lr": 0.0}), *more)
    )
    with pytest.raises(Untrained, match=r"never moved from the first value in 2 steps"):
        lived(tmp_path, method)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("method", "implementation"),
    [("dora", "reference"), *((name, "fused") for name in ("lora", "vera", "adalora", "pissa", "qlora", "galore"))],
)
def test_layers_of_gpt2_are_linear_to_every_method(method: str, implementation: str, tmp_path: Path) -> None:
    """transformers' Conv1D, which most methods and libraries refuse."""
    life, found = lived(tmp_path, method, implementation=implementation, config=GPT2, latency=False)
    assert found.training is not None
    assert not [check.check for check in life.checks if check.outcome is Outcome.FAIL]
    assert {path.rpartition(".")[2] for path in life.layers} == {"c_attn", "c_fc"}


@pytest.mark.slow
def test_a_decoder_with_a_head_of_classes(tmp_path: Path) -> None:
    """It looks for the last token that is no padding, of which a shape has none."""
    _, found = lived(
        tmp_path, "lora", config={**TINY, "architectures": ["LlamaForSequenceClassification"]}, latency=False
    )
    assert found.training is not None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_mixture_of_experts(method: str, tmp_path: Path) -> None:
    """Its experts are one tensor, multiplied at once; of float64, in which the gate judges, torch has no such product."""
    life, found = lived(tmp_path, method, config=MIXTRAL, latency=False)
    assert found.training is not None
    assert not [check.check for check in life.checks if check.outcome is Outcome.FAIL]


@pytest.mark.slow
def test_a_cell_keeps_its_training_where_its_latency_has_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee PYTORCH_ALLOC_CONF")

    monkeypatch.setattr(latency, "measure", measure)
    _, found = lived(tmp_path, "lora")
    assert found.training is not None
    assert {(one.variant, one.kind) for one in found.latency} == {
        (variant, kind) for variant in ("base", "unmerged", "merged") for kind in ("prefill", "decode")
    }
    assert {one.because for one in found.latency} == {"out of memory: CUDA out of memory. Tried to allocate 2.00 GiB."}


@pytest.mark.slow
def test_a_cell_keeps_its_training_where_the_counted_step_has_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, started = loop.step, list[int]()

    def step(adapted: Any, parts: Any, optimizer: Any, seed: int) -> Any:
        started.append(seed)
        if len(started) > 2:  # the training has two
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4096 bytes.\nMore.")
        return real(adapted, parts, optimizer, seed)

    monkeypatch.setattr(loop, "step", step)
    life, found = lived(tmp_path, "lora", latency=False)
    assert {"latency", "merge"} & {phase.name for phase in life.clock.done} == {"merge"}  # what is checked, not timed
    assert len(started) == 3
    assert found.training is not None
    assert len(found.training.losses) == 2
    assert found.memory.counted_peak_B is None
    (note,) = [note for note in life.notes if "was not counted" in note]
    assert note.endswith(": out of memory: DefaultCPUAllocator: not enough memory: you tried to allocate 4096 bytes.")


@pytest.mark.slow
def test_a_large_model_is_judged_without_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.conformance import subject
    from harness.conformance.comparison import packed_codes

    monkeypatch.setattr(subject, "LARGEST_COPY", 1000)
    monkeypatch.setattr(packed_codes, "PIECE", 4096)
    life, _ = lived(tmp_path, "lora", Base(quantization="nf4-dq", implementation="fused"), "fused")
    outcomes = {check.check.split("/")[1]: check for check in life.checks}
    assert {outcomes[name].outcome for name in ("base", "codes", "forward", "gradient")} == {Outcome.PASS}
    assert "checksums" in outcomes["base"].detail
    assert outcomes["model"].outcome is Outcome.SKIPPED


@pytest.mark.parametrize("double", [False, True])
def test_codes_judged_in_pieces_are_judged_as_a_whole(double: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.conformance.comparison import packed_codes
    from harness.conformance.subject import ExpectedCodes

    monkeypatch.setattr(packed_codes, "PIECE", 1024)
    dense = torch.nn.Linear(64, 49)  # whole pieces and a rest
    torch.nn.init.normal_(dense.weight, generator=torch.Generator().manual_seed(0))
    root = torch.nn.Sequential(dense)
    (form,) = discover().find("base", "nf4-dq" if double else "nf4", "fused")(root, ["0"], torch.float32).values()
    packed, bias = PackedLayer(*form), dense.bias

    def verdicts(bias: torch.Tensor | None = bias) -> set[bool]:
        whole = packed_codes.judge(packed, ExpectedCodes.of(dense.weight, bias=dense.bias), bias)[0]
        return {whole.passed, packed_codes.judge_in_pieces(packed, dense, bias)[0].passed}

    assert verdicts() == {True}
    assert verdicts(bias=None) == {False}
    dense.bias = None
    assert verdicts(bias=None) == {True}
    assert verdicts() == {False}
    dense.bias = bias
    packed.data.view(-1)[-3] ^= 0x10  # one code in the last piece
    assert verdicts() == {False}
    packed.data.view(-1)[-3] ^= 0x10
    packed.absmax[-1] *= 2
    assert verdicts() == {False}


@pytest.mark.slow
def test_what_attaching_changes_in_a_large_model_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.conformance import subject
    from reference import lora

    monkeypatch.setattr(subject, "LARGEST_COPY", 1000)
    attach = lora.attach

    def meddling(model: Any, config: Any, generator: torch.Generator) -> Any:
        with torch.no_grad():
            model.get_submodule("model.norm").weight[7] += 1
        return attach(model, config, generator)

    mine = Implementation("mine", "method", "lora", meddling)
    monkeypatch.setattr("harness.methods.registry.Registry.find", lambda *_: mine)
    with pytest.raises(NonconformingError, match=r"lora/base/bfloat16/init failed: .*model\.norm\.weight has changed"):
        lived(tmp_path, "lora")


@pytest.mark.nightly
def test_a_run_of_shapes_from_the_command_line(fork_sandbox: ForkSandbox) -> None:
    path = written(fork_sandbox.folder)
    (fork_sandbox.folder / "encoder.json").write_text(json.dumps(ROBERTA), encoding="utf-8")
    row = '  - {name: encoder, kind: encoder, source: "shape:./encoder.json"}\n'
    text = path.read_text(encoding="utf-8").replace("sources:\n", f"sources:\n{row}")
    path.write_text(text.replace("id: full,", "id: full, model: encoder,"), encoding="utf-8")
    finished = fork_sandbox.command("run", str(path), "--out", "run")
    assert finished.code == Exit.PASS, finished.err
    run = fork_sandbox.read()
    assert {record.status for record in run.records} == {Status.OK}
    for record in run.records:
        assert record.measurements is not None
        assert record.measurements.accuracy is None
        assert [use.name for use in record.assets] == [record.cell.model, SYNTHETIC]
        assert bool(record.measurements.parameters.head) == (record.cell.model == "encoder")
        assert len(record.assets[0].sha256) == 64
    page = (fork_sandbox.run_folder / "report.html").read_text(encoding="utf-8")
    assert "No Cell was scored, so there is no ranking" in page
    assert "the weights are random" in page


def test_a_shape_is_fetched_from_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_HARNESS_CACHE", str(tmp_path))
    source = Source(name="x", kind="causal", source="shape:llama-65b")
    here = fetch.ensure(source)
    assert fetch.local_folder(source) == here
    assert shapes.read_config(here / "config.json") == shapes.presets()["llama-65b"].config
    assert isinstance(fetch.asset_use(source).sha256, str)


def test_the_first_blocks_of_a_preset_are_a_shape_of_its_width() -> None:
    whole, cut = shapes.config_of("llama-65b"), shapes.config_of("llama-65b/2-blocks")
    assert cut == {**whole, "num_hidden_layers": 2}
    assert shapes.config_of("gpt2-medium/1-block")["n_layer"] == 1
    assert shapes.preset("llama-65b/80-blocks").config == whole  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("llama-65b/81-blocks", "`llama-65b` has 80 blocks, not 81; write as many or fewer"),
        ("lama-65b/2-blocks", "no shape is called `lama-65b/2-blocks`"),
        ("llama-65b/0-blocks", "no shape is called `llama-65b/0-blocks`"),
    ],
)
def test_blocks_that_a_preset_does_not_have_are_refused(name: str, says: str) -> None:
    assert says in shapes.address_problem(name)
