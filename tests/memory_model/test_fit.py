"""The verb `fit`: what it answers, how it asks back, and what it says of itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.assets import generated, shapes
from harness.cli import main
from harness.conformance.tolerance_constants import FOOTPRINT_LEDGER
from harness.errors import Exit, UsageError
from harness.memory_model import fit, isolated_step, largest_batch, model_shapes, size_units
from harness.memory_model.counting import count
from harness.memory_model.ledger import OPTIMIZERS, OWN, Ledger
from harness.records.record import Cell
from harness.report import fit_table
from support import forked_modules

# Weights as the papers print them, in thousand millions: tables 2, 3 and 2.1.
PRINTED = {
    "llama-7b": 6.7, "llama-13b": 13.0, "llama-33b": 32.5, "llama-65b": 65.2, "llama-3-8b": 8, "llama-3-70b": 70,
    "gpt-3-175b-shape": 175,
}  # fmt: skip
# Weights of the released checkpoints, tied ones once, as the hub's pages and `num_parameters()` count them; of an encoder
# with a head of two classes in the place of the pooler and the pretraining's head. Of GaLore's, which were not released,
# what its configs come to.
RELEASED = {
    "mistral-7b": 7_241_732_096, "gemma-7b": 8_537_680_896, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080,
    "galore-60m": 58_073_600, "galore-130m": 134_105_856, "galore-350m": 367_969_280, "galore-1b": 1_339_082_752,
    "roberta-base": 124_647_170, "roberta-large": 355_361_794, "deberta-v3-base": 184_423_682,
    "deberta-v2-xxlarge": 1_566_913_538,
}  # fmt: skip
ASKED = ("lora", "qlora", "full", "galore", "frozen")


pytestmark = pytest.mark.usefixtures("forks")


@pytest.fixture(scope="module")
def of_llama_7b() -> dict[str, Any]:
    """Count Llama-7B once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        forked_modules.use(patch)
        return fit.count_model(fit.fit_request("llama-7b", "24GiB", ASKED, optimizers=OPTIMIZERS))


@pytest.fixture
def counted(of_llama_7b: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "count_model", lambda asked: of_llama_7b)


def document(capsys: pytest.CaptureFixture[str], *words: str, steps: bool = False) -> dict[str, Any]:
    methods = [word for name in ASKED for word in ("--method", name)] if "--method" not in words else []
    by_formulas = [] if steps else ["--formulas"]
    assert main(["fit", "llama-7b", *words, *methods, *by_formulas, "--json"]) == Exit.PASS
    return dict(json.loads(capsys.readouterr().out))


def row(found: dict[str, Any], method: str, base: str = "none") -> dict[str, Any]:
    (one,) = (row for row in found["rows"] if (row["method"], row["base"]) == (method, base))
    return dict(one)


@pytest.mark.slow
@pytest.mark.usefixtures("counted")
def test_an_optimizer_that_a_method_cannot_have_is_not_answered_for_another(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--memory", "80GB", "--method", "galore", "--optimizer", "paged-adamw")
    (galore,) = document(capsys, *words)["rows"]
    assert galore["because"] == "it has its own optimizer: adamw or adamw-8bit"
    assert galore["ledger"] is None


@pytest.mark.slow
@pytest.mark.usefixtures("counted")
def test_each_row_is_the_largest_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "--memory", "24GiB")
    fits = [one for one in found["rows"] if one["ledger"] and not one["because"]]
    assert {(one["method"], one["base"]) for one in fits} >= {("lora", "none"), ("lora", "nf4"), ("qlora", OWN)}
    for one in fits:
        ledger = one["ledger"]
        a_text = (ledger["activations_B"] + ledger["logits_B"]) // one["batch"]
        assert 0 <= ledger["left_B"] < a_text
        assert ledger["total_B"] + ledger["left_B"] == found["memory_B"] == 24 * 2**30
        parts = ("weights_B", "adapter_B", "gradients_B", "optimizer_B", "activations_B", "logits_B")
        assert ledger["total_B"] == sum(ledger[part] for part in parts)
    assert row(found, "lora", "nf4")["batch"] > row(found, "lora")["batch"]


@pytest.mark.slow
@pytest.mark.usefixtures("counted")
def test_no_other_rank_has_a_larger_product(of_llama_7b: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    found = row(document(capsys, "--memory", "24GiB"), "lora", "nf4")
    for one in of_llama_7b["methods"]["lora"]:
        more = found["rank"] * found["batch"] // one["rank"] + 1
        needed = Ledger.of(one, "nf4", "adamw", of_llama_7b["logits"], 512 * more, checkpointing=False, layerwise=False)
        assert needed.total > 24 * 2**30


@pytest.mark.slow
@pytest.mark.usefixtures("counted")
def test_what_does_not_fit_says_what_it_would_take(capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "--memory", "24GiB")
    full = row(found, "full")
    assert full["because"] == "does not fit"
    assert full["ledger"]["left_B"] < 0
    without_room = row(document(capsys, "--memory", "13GiB"), "lora")  # the weights alone would fit, one text does not
    assert (without_room["because"], without_room["batch"]) == ("does not fit", 1)
    assert without_room["ledger"]["left_B"] < 0
    (frozen,) = (one for one in found["rows"] if one["method"] == "frozen")
    assert (frozen["because"], frozen["ledger"]) == ("nothing of this model trains", None)


@pytest.mark.slow
@pytest.mark.usefixtures("counted")
def test_the_memory_that_papers_print(capsys: pytest.CaptureFixture[str]) -> None:
    # Full fine-tuning in bfloat16 with float32 masters: 2 + 2 + 4 + 8 bytes a weight. ZeRO, arXiv:1910.02054, section 3.1.
    found = document(capsys, "--memory", "1TB")
    ledger = row(found, "full")["ledger"]
    lasting = sum(ledger[part] for part in ("weights_B", "adapter_B", "gradients_B", "optimizer_B"))
    assert abs(lasting / (16 * found["parameters"]) - 1) <= FOOTPRINT_LEDGER
    # Llama-7B in NF4 with double quantisation: 4.127 bits a packed weight (QLoRA, section 3).
    outside = 2 * (2 * 32000 * 4096 + 65 * 4096)
    packed = row(found, "lora", "nf4-dq")["ledger"]["weights_B"] - outside
    assert abs(packed / ((found["parameters"] - outside / 2) * 4.127 / 8) - 1) <= FOOTPRINT_LEDGER


@pytest.mark.slow
@pytest.mark.usefixtures("counted")
def test_paged_states_are_counted_apart(capsys: pytest.CaptureFixture[str]) -> None:
    paged = row(document(capsys, "--memory", "1TB", "--optimizer", "paged-adamw"), "full")["ledger"]
    together = row(document(capsys, "--memory", "1TB", "--optimizer", "adamw"), "full")["ledger"]
    assert paged["host_B"] > paged["optimizer_B"]
    assert together["host_B"] == 0
    assert (
        main(["fit", "llama-7b", "--memory", "1TB", "--method", "full", "--optimizer", "paged-adamw", "--formulas"])
        == Exit.PASS
    )
    assert "  host" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("counted")
def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for name in ASKED for word in ("--method", name)]
    assert main(["fit", "llama-7b", "--memory", "24 GB", *words, "--formulas"]) == Exit.PASS
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "memory: 24.00 GB = 24,000,000,000 bytes; texts of 512 tokens, adamw" in printed.out
    assert re.search(r"^  full +none +- +1 +- .* -\d", printed.out, re.MULTILINE)
    assert "  frozen: nothing of this model trains" in printed.out
    for not_predicted in ("allocator", "workspaces", "CUDA context"):
        assert not_predicted in printed.out
    *_, blank, explanation = printed.out.splitlines()
    assert (blank, explanation.startswith("sizes in GB; ")) == ("", True)
    assert max(map(len, printed.out.splitlines())) <= 140


@pytest.mark.slow
@pytest.mark.usefixtures("counted")
def test_more_tokens_leave_room_for_fewer_texts(capsys: pytest.CaptureFixture[str]) -> None:
    short, long = (row(document(capsys, "--memory", "40GiB", "--tokens", n), "lora", "nf4") for n in ("256", "2048"))
    assert short["batch"] > long["batch"]
    again = row(document(capsys, "--memory", "40GiB", "--tokens", "2048", "--checkpointing"), "lora", "nf4")
    assert again["batch"] > long["batch"]


@pytest.mark.nightly
@pytest.mark.e2e
def test_the_answer_comes_from_a_child_process_and_the_command_imports_no_torch() -> None:
    code = (
        "import sys\nfrom harness.cli import main\n"
        "words = ['--memory', '2TiB', '--method', 'lora', '--method', 'dora', '--rank', '4', '--formulas']\n"
        "code = main(['fit', 'gpt-3-175b-shape', *words])\n"
        "sys.exit('imports torch' if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "counting gpt-3-175b-shape without its weights ...\n")
    assert "174,604," in done.stdout
    assert "not included: activations" in done.stdout
    assert re.search(r"^  dora +none +4 ", done.stdout, re.MULTILINE)  # whose layers are GPT-2's


@pytest.mark.nightly
def test_a_shape_has_the_weights_of_the_model_that_it_is_named_after() -> None:
    counted = {n: count(one.config, one.kind, "bfloat16", {}, []) for n, one in shapes.presets().items()}
    found = {name: one["parameters"] for name, one in counted.items()}
    assert {name: found[name] for name in RELEASED} == RELEASED
    off = {name: found[name] / (billions * 1e9) - 1 for name, billions in PRINTED.items()}
    assert max(map(abs, off.values())) <= FOOTPRINT_LEDGER, off
    assert found.keys() == RELEASED.keys() | PRINTED.keys()
    assert all(one["positions"] for one in counted.values())


@pytest.mark.slow
def test_an_encoder_is_counted_with_its_new_head_and_without_activations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["roberta-base", "--memory", "8GiB", "--method", "lora", "--method", "full", "--rank", "8"]
    assert main(["fit", *words, "--formulas", "--json"]) == Exit.PASS
    found = json.loads(capsys.readouterr().out)
    assert found["targets"] == ["query", "key", "value", "output.dense", "intermediate.dense"]  # not its head's `dense`
    head, inside = 768 * 768 + 768 + 2 * 768 + 2, 12 * 8 * (4 * (768 + 768) + 2 * (768 + 3072))
    assert row(found, "lora")["trainable"] == head + inside  # the head trains whole
    assert row(found, "full")["trainable"] == found["parameters"] == RELEASED["roberta-base"]
    counted = count(shapes.presets()["roberta-base"].config, "encoder", "bfloat16", {"lora": [{"rank": 8}]}, [])
    monkeypatch.setattr(fit, "count_model", lambda asked: counted)
    words = [*words[:5], "--rank", "8", "--formulas"]
    assert main(["fit", *words]) == Exit.PASS
    assert "not included: activations" in capsys.readouterr().out
    # Two of its 514 positions are for padding.
    assert main(["fit", *words, "--tokens", "513"]) == Exit.USAGE
    assert "roberta-base reads 512 tokens at most, got 513" in capsys.readouterr().err


@pytest.mark.nightly
def test_a_folder_with_a_config_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generated.tiny_llama(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    words = ["--memory", "64MiB", "--method", "lora", "--rank", "4", "--formulas", "--json"]
    assert main(["fit", str(tmp_path), *words]) == Exit.PASS
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 256
    assert len(found["rows"]) == 3
    assert found["rows"][0]["longest"] == 256
    assert main(["fit", str(tmp_path), "--memory", "64MiB", "--tokens", "257"]) == Exit.USAGE
    assert "reads 256 tokens at most, got 257" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("share", [0.4, 0.97, 1.3, 3.0])
def test_a_step_says_what_fits(
    share: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever a text takes in truth, the formula's count or another: the largest is found, and little more is tried."""
    words = ("--memory", "24GiB", "--method", "lora", "--method", "full")
    plain = {(r["method"], r["base"]): r for r in document(capsys, *words)["rows"]}
    tried: list[int] = []

    def took(cell: dict[str, Any]) -> int:
        ledger = plain[cell["method"], cell["base"]["quantization"]]["ledger"]
        a_text = (ledger["activations_B"] + ledger["logits_B"]) / plain[cell["method"], "none"]["batch"]
        recipe = cell["training"]
        return int(16e9 + 0.3e9 + share * a_text * recipe["batch"] * recipe["max_tokens"] / 512)

    def peak(cell: Cell, *_: Any, **__: Any) -> dict[str, Any]:
        tried.append(cell.training.batch)
        return {"peak_B": took(cell.model_dump(mode="json")), "peak_by": ""}

    monkeypatch.setattr(isolated_step, "peak", peak)
    found = document(capsys, *words, steps=True)
    for one in found["rows"]:
        at = {"batch": one["batch"], "max_tokens": 512}
        cell = {"method": one["method"], "base": {"quantization": one["base"]}, "training": at}
        assert one["peak_B"] == took(cell)
        assert (one["because"] == "") == (one["peak_B"] <= found["memory_B"])
        assert one["because"] == "" or one["batch"] == 1
        assert took(cell | {"training": at | {"batch": one["batch"] + 1}}) > found["memory_B"]
        if not one["because"]:
            of_one = cell | {"training": {"batch": 1, "max_tokens": one["longest"]}}
            longer = cell | {"training": {"batch": 1, "max_tokens": int(1.02 * one["longest"])}}
            assert took(of_one) <= found["memory_B"]
            assert one["longest"] == 2048 or took(longer) > found["memory_B"]
        assert one["peak_by"] == ("fused" if one["method"] == "lora" else "reference")
        ledger = one["ledger"]
        lasting = sum(ledger[part] for part in ("weights_B", "adapter_B", "gradients_B", "optimizer_B"))
        assert ledger["total_B"] == lasting + max(ledger["activations_B"] + ledger["logits_B"], ledger["step_B"])
    assert len(tried) <= 16 * len(found["rows"])  # of a batch and of a length, where formulas are three times off


@pytest.mark.parametrize("grain", [0.0, 0.01])
@pytest.mark.parametrize("first", [1, 60, 3000])
@pytest.mark.parametrize(
    "grows",
    [
        lambda n: 10 * n, lambda n: max(2 * n, 10 * n - 500), lambda n: n * n // 9, lambda n: max(0, n - 100) * 50,
        lambda n: 400,
    ],
    ids=["line", "kink", "square", "late", "flat"],
)  # fmt: skip
def test_the_largest_is_found_however_a_peak_grows(grows: Callable[[int], int], first: int, grain: float) -> None:
    """Of several stages the highest counts, and attention without a kernel of its own grows as the square of the length."""
    lasting, room, most = 1_000, 2_000, 4_096
    tried = largest_batch.search(lambda n: lasting + grows(n), room, first, lasting, most, grain)
    assert isinstance(tried, dict)
    found = largest_batch.largest_fitting(tried, room)
    true = max(n for n in range(most + 1) if lasting + grows(n) <= room)
    assert true / (1 + grain) <= found <= true or (true - 1 <= found <= true and grain)


def test_what_cannot_be_tried_is_said_unless_something_fits() -> None:
    def peak(n: int) -> int | str:
        return 10 * n if n < 8 else "too slow"

    assert largest_batch.search(peak, 100, 9, 0) == "too slow"
    found = largest_batch.search(peak, 100, 7, 0)
    assert isinstance(found, dict)
    assert largest_batch.largest_fitting(found, 100) == 7


@pytest.mark.slow
@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize(
    ("memory", "of_rank", "rank"), [("24GiB", 2**28, 32), ("13GiB", 2**20, 256), ("24GiB", 2**34, 1)]
)
def test_where_formulas_are_wrong_about_the_rank_a_step_chooses_it(
    memory: str, of_rank: int, rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 24 GiB the formulas say that a rank of 256 fits, of 13 GiB that none does; here a step takes what it takes."""
    room = {"24GiB": 24 * 2**30, "13GiB": 13 * 2**30}[memory]

    def peak(cell: Cell, *_: Any, **__: Any) -> dict[str, Any]:
        rank = cell.config["rank"]
        assert isinstance(rank, int)
        texts = cell.training.batch * cell.training.max_tokens / 512 - 1
        return {
            "peak_B": int(room - 2**33 * (memory == "24GiB") - 2**30 + rank * of_rank + texts * 2**36),
            "peak_by": "",
        }

    monkeypatch.setattr(isolated_step, "peak", peak)
    words = ("--memory", memory, "--method", "lora", "--base", "none")
    (by_formulas,), (one,) = document(capsys, *words)["rows"], document(capsys, *words, steps=True)["rows"]
    assert by_formulas["rank"] != one["rank"] == rank
    assert (one["because"] == "") == (one["peak_B"] <= room)


@pytest.mark.nightly
def test_a_step_of_a_small_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generated.tiny_llama(tmp_path)
    words = ["--memory", "16MiB", "--method", "lora", "--method", "frozen", "--base", "none", "--rank", "4"]
    assert main(["fit", str(tmp_path), *words, "--json"]) == Exit.PASS
    found = json.loads(capsys.readouterr().out)
    lora, frozen = sorted(found["rows"], key=lambda one: one["method"], reverse=True)
    assert 0.8 * 16 * 2**20 < lora["peak_B"] <= 16 * 2**20
    assert (frozen["peak_B"], frozen["no_peak"]) == (None, "nothing of this model trains")
    printed = " ".join("\n".join(fit_table.lines(found)).split())
    assert "other needed free" in printed
    assert lora["peak_by"] == "fused"


@pytest.mark.nightly
def test_a_model_without_a_formula_is_answered_by_steps_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "hidden_size": 64,
             "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1000}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(facts))
    words = ["--memory", "256MiB", "--method", "lora", "--rank", "8", "--base", "none"]
    assert main(["fit", str(tmp_path), *words]) == Exit.PASS
    printed = capsys.readouterr().out
    ((batch, peak),) = re.findall(
        r"^  lora +none +8 +(\d+) .* ([\d.]+) +[\d.]+$", printed, re.MULTILINE
    )  # needed, free
    assert int(batch) > 1
    assert 0.8 * 256 < float(peak) <= 256


@pytest.mark.slow
def test_a_rank_that_a_method_cannot_have_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generated.tiny_llama(tmp_path)
    words = ["fit", str(tmp_path), "--memory", "1GiB", "--formulas", "--rank", "4", "--rank", "3000"]
    words += ["--method", "pissa", "--method", "lora", "--base", "none"]
    assert main(words) == Exit.PASS
    printed = capsys.readouterr().out
    assert "not tried for pissa: rank 3000: " in printed
    assert "singular values" in printed
    assert "not tried for lora" not in printed
    assert main([*words, "--json"]) == Exit.PASS
    (one,) = json.loads(capsys.readouterr().out)["left_out"]
    assert (one["method"], one["rank"]) == ("pissa", 3000)


def test_all_mistakes_come_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["--memory", "24G", "--method", "lorra", "--base", "nf5", "--dtype", "float8", "--tokens", "0"]
    assert main(["fit", "lama-7b", *wrong, "--optimizer", "sgd"]) == Exit.USAGE
    printed = capsys.readouterr()
    assert printed.out == ""
    for said in (
        "7 mistakes", "did you mean `llama-7b`?", "did you mean `lora`?", "did you mean `nf4`?", "`float8`", "`sgd`",
        "--tokens: 0 is not at least 1", "24GiB (25,769,803,776 bytes)", "24GB (24,000,000,000 bytes)",
    ):  # fmt: skip
        assert said in printed.err


@pytest.mark.slow
def test_a_target_that_fits_no_layer_and_a_rank_that_no_method_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generated.tiny_llama(tmp_path)
    wrong = ["--target", "q_projj", "--target", "query", "--method", "lora"]
    assert main(["fit", str(tmp_path), "--memory", "64MiB", *wrong]) == Exit.USAGE
    said = capsys.readouterr().err
    assert "named 'q_projj'; this model has: " in said
    assert "did you mean `q_proj`?" in said
    assert "named 'query'" in said
    assert "name layers of " in said
    assert main(["fit", str(tmp_path), "--memory", "64MiB", "--rank", "5000", "--method", "lora"]) == Exit.USAGE
    assert "--rank: lora: must be at most 4096, got 5000" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["none", "empty", "torn", "untyped", "unknown"])
def test_a_config_that_says_nothing(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = {"empty": None, "torn": "{", "untyped": "{}", "unknown": '{"model_type": "lama"}'}.get(folder)
    if folder != "none":
        (tmp_path / folder).mkdir()
    if text is not None:
        (tmp_path / folder / "config.json").write_text(text)
    assert main(["fit", str(tmp_path / folder), "--memory", "1GiB", "--method", "full"]) == Exit.USAGE
    said = capsys.readouterr().err
    assert folder in said
    assert "hint: " in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_repository_is_looked_for_in_the_cache_alone(tmp_path: Path) -> None:
    code = (
        "import sys, socket\nfrom harness.cli import main\n"
        "def refuse(*_): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = refuse\n"
        "sys.exit(main(['fit', 'some/model', '--memory', '1GiB']))"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == Exit.USAGE
    assert "some/model is not in the hub's cache, and `fit` downloads nothing" in done.stderr


@pytest.mark.parametrize(
    ("text", "number_B"),
    [
        ("24GiB", 24 * 2**30),
        ("24 GB", 24 * 10**9),
        ("1.5TiB", 3 * 2**39),
        ("2TB", 2 * 10**12),
        ("512MiB", 2**29),
        (".5kB", 500),
    ],
)
def test_sizes(text: str, number_B: int) -> None:
    assert size_units.parse_size(text).number_B == number_B


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("24G", "`24G` may be 24GiB"), ("24", "`24` may be 24GiB"), ("24gb", "`24gb` may be 24GiB"), ("24m", "24MiB"),
        ("24Gb", "may be"), ("24XB", "no unit of memory"), ("-1GiB", "no size"), ("0GiB", "no size that a machine"),
        ("nan", "no size"), ("1e9GiB", "no size"),
        ("9" * 400, "no size that a machine"), ("9" * 400 + "GiB", "no size that a machine"),
        ("9999999999TiB", "no size that a machine"), ("", "no size"),
    ],
)  # fmt: skip
def test_what_is_no_size(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        size_units.parse_size(text)


def test_models_of_the_table_are_not_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PEFT_HARNESS_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="minilm-l6 is not on this machine, and `fit` downloads nothing"):
        model_shapes.find_model("minilm-l6")


@pytest.mark.parametrize("topic", ["fit", "weights", "activations", "logits", "host"])
def test_explain(topic: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", topic]) == Exit.PASS
    said = capsys.readouterr().out
    assert any(line.startswith(topic) for line in said.splitlines())
    assert ("2 (4 D + 4)" in said) == (topic == "activations")
