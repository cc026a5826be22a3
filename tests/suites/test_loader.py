"""Suites that are right: what they mean, and that a Cell's id depends on nothing else."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import get_args

import pytest

from harness.errors import SuiteError, UsageError
from harness.methods.spec import methods
from harness.records import naming
from harness.records.record import Base, Cell, Evaluation, Optimizer, Training
from harness.suites import entry as suite_entry
from harness.suites import loader, schema
from harness.suites.expand import Plan, select

SUITE = """
suite: small
matrix:
  - model: tiny-llama
    task: toy-sentiment
    training: {steps: 4, batch: 2}
    evaluation: {items: 8}
    cells:
"""


@pytest.fixture
def read(tmp_path: Path):
    """Return a function from the text of `cells:` (or of a whole suite) to a Plan."""

    def plan(text: str) -> Plan:
        path = tmp_path / "suite.yaml"
        path.write_text(text if "suite:" in text else SUITE + text, encoding="utf-8")
        return loader.load(path).plan

    return plan


@pytest.mark.slow
def test_built_in_suites_are_sound() -> None:
    assert {"quick", "smoke"} <= set(loader.names())
    for name in loader.names():
        assert loader.load(name).plan.cells


def test_smoke_in_order() -> None:
    suite = loader.load("smoke")
    plan = suite.plan
    assert [(plan.ids[c.cell_id], c.implementation, c.dtype) for c in plan.cells] == [
        ("frozen", "reference", "float32"),
        ("lora", "reference", "float32"),
        ("lora", "fused", "float32"),
        ("lora-float64", "reference", "float64"),
    ]
    (comparison,) = plan.comparisons
    assert comparison.left == [c.cell_id for c in plan.cells[1:3]]
    assert comparison.right == [plan.cells[3].cell_id]
    assert set(suite.tasks) == {"toy-sentiment"}
    assert suite.tasks["toy-sentiment"].data.name == "toy-sentiment"


def test_golden_cell_id() -> None:
    # Records are found again by this id, by --resume, by history and by baselines. If this line fails, every result
    # that anybody has stored is orphaned: raise records.SCHEMA and say so, or take the change back.
    cell = Cell(
        model="tiny-llama",
        task="toy-sentiment",
        method="lora",
        implementation="reference",
        config={"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj"], "dropout": 0.0},
        base=Base(quantization="nf4", implementation="bitsandbytes"),
        training=Training(steps=12, batch=8, lr=5e-3),
        evaluation=Evaluation(items=32),
    )
    assert cell.cell_id == "bfaf85e3181f2479"


PUBLISHED = """{"model": "minilm-l6", "task": "movie-sentiment", "method": "lora", "implementation": "reference", "config":
{"rank": 8, "alpha": 16.0, "targets": ["query", "key", "value", "dense"], "dropout": 0.0}, "base": {"quantization": "none",
"implementation": ""}, "optimizer": "adamw", "dtype": "float32", "seed": 0, "training": {"steps": 72, "batch": 16, "lr":
0.001, "head_lr": 0.001, "warmup": 8, "weight_decay": 0.0, "max_tokens": 32}, "evaluation": {"items": 1000, "batch": 50}}"""
"""A Cell as a published Record of 2026-11-24 holds it."""


def test_a_published_cell_keeps_its_id_and_only_a_new_value_changes_it() -> None:
    cell = Cell.model_validate_json(PUBLISHED)
    assert cell.cell_id == "605c5559d5be74fc"
    changes = [
        {"accumulate": 2},
        {"checkpointing": True},
        {"lr_ratio": 16.0},
        {"compile": True},
        {"accumulate": 2, "lr_ratio": 16.0},
    ]
    several = [cell.model_copy(update={"training": cell.training.model_copy(update=change)}) for change in changes]
    several += [cell.model_copy(update={"optimizer": name}) for name in get_args(Optimizer)]
    assert len({one.cell_id for one in (cell, *several)}) == len(several)  # `adamw` is what it had
    assert len({one.label for one in (cell, *several)}) == len(several)
    for one in several:
        assert Cell.model_validate_json(one.model_dump_json()).cell_id == one.cell_id


def test_an_optimizer_and_how_a_batch_is_gone_through_are_axes(read) -> None:
    text = "optimizer: [adamw, paged-adamw-8bit], training: {accumulate: [1, 2], checkpointing: [false, true]}"
    plan = read(f"      - {{method: lora, {text}}}")
    assert [(c.optimizer, c.training.accumulate, c.training.checkpointing) for c in plan.cells] == [
        (optimizer, parts, again)
        for optimizer in ("adamw", "paged-adamw-8bit")
        for parts in (1, 2)
        for again in (False, True)
    ]
    assert [cell.label.partition("] ")[2] for cell in select(plan, "accumulate=2,checkpointing=true").cells] == [
        "accumulate=2 checkpointing",
        "paged-adamw-8bit accumulate=2 checkpointing",
    ]


def test_batches_and_lengths_are_axes(read) -> None:
    plan = read("      - {method: lora, training: {batch: [2, 4], max_tokens: [16, 32], accumulate: [1, 2]}}")
    assert [(c.training.batch, c.training.max_tokens) for c in select(plan, "accumulate=2").cells] == [
        (2, 16), (2, 32), (4, 16), (4, 32)
    ]  # fmt: skip
    assert [c.training.accumulate for c in select(plan, "batch=4,max_tokens=32").cells] == [1, 2]
    with pytest.raises(SuiteError) as caught:
        read("      - {method: lora, training: {batch: [2, 6, 9], accumulate: [1, 2, 3]}}")
    assert [(p.what, p.hint) for p in caught.value.problems] == [
        ("`accumulate` is 2, which does not divide the batch of 9 examples", "write one of 1"),
        ("`accumulate` is 3, which does not divide the batch of 2 examples", "write one of 1"),
    ]


def test_what_latencies_are_taken_of_is_asked_for(read) -> None:
    """A search for a learning rate has none: its tries stay the Cells that they were, as do those that ask for the usual."""
    entry = "{{method: lora, prompts: {}, tune: {{lr: [1e-3, 1e-2], items: 8}}}}"
    asked, usual = (
        read(f"      - {entry.format(prompts)}") for prompts in ("{batch: 16, tokens: 256, passes: 100}", "{batch: 1}")
    )
    plain = read("      - {method: lora, tune: {lr: [1e-3, 1e-2], items: 8}}")
    (long,) = (c for c in asked.cells if not c.evaluation.skip)
    assert (long.evaluation.prompt_batch, long.evaluation.prompt_tokens, long.evaluation.passes) == (16, 256, 100)
    assert [c.cell_id for c in usual.cells] == [c.cell_id for c in plain.cells]
    same = {c.cell_id for c in asked.cells} & {c.cell_id for c in plain.cells}
    assert same == {c.cell_id for c in plain.cells if c.evaluation.skip}
    never, bare = (read(f"      - {{method: lora, latency: never{more}}}") for more in (", prompts: {passes: 9}", ""))
    assert [c.cell_id for c in never.cells] == [c.cell_id for c in bare.cells]
    with pytest.raises(SuiteError) as caught:
        read("      - {method: lora, prompts: {batch: 0, tokens: many, passes: 5, length: 3}}")
    assert {p.what for p in caught.value.problems} == {
        "`batch` is 0", "`tokens` is 'many'", "`passes` is 5", "unknown key `length`"
    }  # fmt: skip


def test_latencies_of_the_first_seed_alone(read) -> None:
    def of(latency: str) -> Plan:
        return read(f"      - {{method: lora, seed: [4, 5], latency: {latency}, tune: {{lr: [1e-3, 1e-2], items: 8}}}}")

    every, first, never = of("every-seed"), of("first-seed"), of("never")
    asked = [[c.evaluation.latency for c in plan.cells if not c.evaluation.skip] for plan in (every, first, never)]
    assert asked == [[True, True], [True, False], [False, False]]
    # No try of a learning rate has them, and they make no Cell another recipe.
    assert not any(c.evaluation.latency for c in every.cells if c.evaluation.skip)
    recipes = {c.recipe_id for plan in (every, first, never) for c in plan.cells if not c.evaluation.skip}
    assert len(recipes) == 1
    assert not any("latency" in name for name in naming.full(first.cells).values())
    timed, untimed = every.cells[0], never.cells[0]
    assert timed.cell_id != untimed.cell_id
    assert len(set(naming.full([timed, untimed]).values())) == 2  # where there is no other difference, it is told


def test_cell_id_ignores_key_order_and_written_defaults(read) -> None:
    (short,) = read("      - {method: lora, config: {rank: 8, targets: [q_proj, v_proj]}}").cells
    (long,) = read(
        "      - dtype: float32\n        seed: [0]\n        optimizer: adamw\n        base: {quantization: none}\n"
        "        config: {targets: [q_proj, v_proj], dropout: 0, alpha: 16, rank: 8}\n        method: [lora]\n"
        "        training: {weight_decay: 0, lr: 0.001, accumulate: 1, checkpointing: false, lr_ratio: 1}\n"
        "        implementation: reference\n"
    ).cells
    assert short == long
    assert short.cell_id == long.cell_id


def test_cell_id_survives_json(read) -> None:
    (cell,) = read("      - {method: lora, config: {alpha: 16}, training: {lr: 1}}").cells
    assert Cell.model_validate_json(cell.model_dump_json()).cell_id == cell.cell_id


def test_every_field_of_a_cell_changes_its_id(read) -> None:
    variants = [
        "",
        "model: smollm2-135m-instruct",
        "implementation: fused",
        "config: {rank: 2}",
        "base: {quantization: nf4, implementation: bitsandbytes}",
        "dtype: bfloat16",
        "seed: 1",
        "training: {lr: 2e-3}",
        "training: {accumulate: 2}",
        "training: {checkpointing: true}",
        "training: {lr_ratio: 4}",
        "optimizer: adamw-8bit",
        "evaluation: {items: 9}",
    ]
    text = "".join(f"      - {{method: lora, id: c{n}, {v}}}\n" for n, v in enumerate(variants))
    assert len(read(text).cells) == len(variants)


def test_axes_multiply_and_the_seed_turns_fastest(read) -> None:
    plan = read("      - {method: lora, config: {rank: [1, 4]}, training: {lr: [1e-3, 2e-3]}, seed: [0, 1]}")
    assert [(c.config["rank"], c.training.lr, c.seed) for c in plan.cells] == [
        (rank, lr, seed) for rank in (1, 4) for lr in (1e-3, 2e-3) for seed in (0, 1)
    ]


def test_a_list_field_takes_a_list_as_one_value_and_lists_as_an_axis(read) -> None:
    (one,) = read("      - {method: lora, config: {targets: [q_proj, v_proj]}}").cells
    assert one.config["targets"] == ["q_proj", "v_proj"]
    two = read("      - {method: lora, config: {targets: [[q_proj], [q_proj, v_proj]]}}").cells
    assert [c.config["targets"] for c in two] == [["q_proj"], ["q_proj", "v_proj"]]


def test_cells_are_merged_deeply_into_their_block(read) -> None:
    (cell,) = read("      - {method: lora, training: {lr: 0.5}, evaluation: {items: 3}}").cells
    assert cell.training == Training(steps=4, batch=2, lr=0.5)
    assert cell.evaluation == Evaluation(items=3)


def test_a_shared_config_goes_to_the_methods_that_have_the_key(read) -> None:
    text = SUITE.replace("    cells:\n", "    config: {rank: 4, targets: [q_proj]}\n    cells:\n")
    cells = "      - {method: full}\n      - {method: lora, config: {rank: 2}}\n      - {method: [frozen, lora]}\n"
    assert [(c.method, c.config.get("rank"), c.config.get("targets")) for c in read(text + cells).cells] == [
        ("full", None, None),
        ("lora", 2, ["q_proj"]),
        ("frozen", None, None),
        ("lora", 4, ["q_proj"]),
    ]


def test_a_block_without_cells_is_an_entry(read) -> None:
    text = SUITE.replace("    cells:\n", "    method: [frozen, full]\n")
    assert [c.method for c in read(text).cells] == ["frozen", "full"]


def test_default_ids(read) -> None:
    plan = read("      - {method: frozen}\n      - {method: lora, id: mine}\n      - {method: [lora, full], seed: 1}")
    assert list(dict.fromkeys(plan.ids.values())) == ["frozen-1", "mine", "lora-full-3"]


def test_dates_and_no_are_words(read) -> None:
    text = "suite: no\ntitle: 2026-01-02" + SUITE.removeprefix("\nsuite: small") + "      - {method: lora}"
    assert read(text).cells[0].method == "lora"


def test_own_sources_and_tasks_start_from_the_suites_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    (folder / "model").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / "model" / name).write_text("{}", encoding="utf-8")
    task = Path(loader.data_folder("suites") / "tasks" / "toy-sentiment.yaml").read_text(encoding="utf-8")
    (folder / "task.yaml").write_text(task.replace("data: toy-sentiment", "data: reviews"), encoding="utf-8")
    (folder / "suite.yaml").write_text(
        SUITE.replace("tiny-llama", "./model").replace("toy-sentiment", "task.yaml")
        + "      - {method: lora}\nsources:\n"
        + "  - {name: reviews, kind: data, source: 'file:reviews.csv', rows: {format: csv}}\n",
        encoding="utf-8",
    )
    rows = "".join(f"text {n},{n % 2}\n" for n in range(65))
    (folder / "reviews.csv").write_text(f"text,label\n{rows}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    suite = loader.load("mine/suite.yaml")
    assert suite.tasks["task.yaml"].data.address == str(folder / "reviews.csv")


def test_too_many_cells_are_refused_without_making_them(read) -> None:
    seeds = ", ".join(map(str, range(300)))
    with pytest.raises(UsageError, match="90000 Cells exceed the limit of 10000"):
        read(f"      - {{method: lora, seed: [{seeds}], config: {{rank: [{seeds.replace('0, 1', '1', 1)}, 300]}}}}")


@pytest.mark.parametrize(
    ("expr", "kept"),
    [
        ("id=lora", 2),
        ("method=lora", 3),
        ("method=lora,implementation=fused", 1),
        ("implementation=fused,implementation=reference", 4),
        ("rank=4,dtype=float64", 1),
        ("alpha=8", 3),
        ("lr=0.005", 4),
        ("base=none", 4),
        ("fused", 1),
        ("zero-shot, fused", 2),
        (" method = lora , float64 ", 1),
    ],
)
def test_only(expr: str, kept: int) -> None:
    plan = loader.load("smoke").plan
    chosen = select(plan, expr)
    assert len(chosen.cells) == kept
    assert set(chosen.ids) == {c.cell_id for c in chosen.cells}
    assert chosen.comparisons == plan.comparisons


def test_only_by_the_start_of_a_cell_id() -> None:
    plan = loader.load("smoke").plan
    assert select(plan, plan.cells[2].cell_id[:8]).cells == (plan.cells[2],)


@pytest.mark.parametrize("expr", ["method=dora", "id=lora,dtype=bfloat16", "nothing", "", " , "])
def test_only_without_a_match_lists_what_there_is(expr: str) -> None:
    with pytest.raises(UsageError, match="no Cell fits") as caught:
        select(loader.load("smoke").plan, expr)
    assert "id=lora-float64" in "\n".join(caught.value.details)


def test_only_with_a_mistyped_key() -> None:
    with pytest.raises(UsageError, match="unknown key `methd`") as caught:
        select(loader.load("smoke").plan, "methd=lora")
    assert "did you mean `method`?" in caught.value.hint


@pytest.mark.parametrize("name", sorted(methods()))
def test_methods_are_read_as_python_would_import_them(name: str) -> None:
    module = pytest.importorskip(f"reference.{name}")
    info = methods()[name]
    assert info.spec == module.SPEC
    assert inspect.getdoc(module).startswith(info.summary)
    assert callable(module.attach)
    fields = {f.name: f for f in dataclasses.fields(module.Config)}
    assert list(info.fields) == list(fields)
    for key, field in fields.items():
        read = info.fields[key]
        assert (read.type, read.default) == (field.type, field.default)
        limits = {
            "minimum": read.minimum,
            "maximum": read.maximum,
            "choices": read.choices,
            "omit_default": read.omit_default or None,
            "opt_in": read.opt_in or None,
        }
        assert {k: v for k, v in limits.items() if v is not None} == {
            k: tuple(v) if k == "choices" else v for k, v in field.metadata.items()
        }
        assert not read.problem(read.default)


def test_suite_keys_are_those_of_the_records() -> None:
    assert set(schema.TrainingKeys.model_fields) == set(Training.model_fields)
    prompts = {field.serialization_alias or name for name, field in schema.PromptKeys.model_fields.items()}
    elsewhere = {"skip", "latency"} | prompts  # `tune`, `latency` and `prompts`
    assert set(schema.EvaluationKeys.model_fields) == set(Evaluation.model_fields) - elsewhere
    assert prompts < set(Evaluation.model_fields)
    assert set(schema.BaseKeys.model_fields) == set(Base.model_fields)
    assert set(schema.CellKeys.model_fields) - {"id", "tune", "latency", "prompts"} == set(Cell.model_fields)
    of_the_file = {"id", "where", "places", "tune", "latency"}
    assert {f.name for f in dataclasses.fields(suite_entry.SuiteEntry)} - of_the_file == set(Cell.model_fields) - {
        "method"
    }


@pytest.mark.parametrize(
    ("kind", "value", "problem"),
    [
        ("int", True, "must be a whole number"),
        ("int", 8.0, "must be a whole number"),
        ("int", 0, "must be at least 1"),
        ("int", 9, "must be at most 8"),
        ("float", "1", "must be a number"),
        ("float", float("inf"), "must be finite"),
        ("bool", 1, "must be true or false"),
        ("str", 3, "must be a word"),
        ("tuple[str, ...]", [], "must be a list of words"),
        ("tuple[str, ...]", "q", "must be a list of words"),
    ],
)
def test_values_of_config_fields(kind: str, value: object, problem: str) -> None:
    from harness.methods.spec import FieldInfo

    limits = {"minimum": 1, "maximum": 8} if kind in ("int", "float") else {}
    assert problem in FieldInfo(kind, None, **limits).problem(value)


def test_choices_of_config_fields() -> None:
    from harness.methods.spec import FieldInfo

    field = FieldInfo("str", "a", choices=("a", "b"))
    assert field.problem("c") == "must be one of a, b; got 'c'"
    assert field.problem("b") == ""
