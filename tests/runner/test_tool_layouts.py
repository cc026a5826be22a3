"""Finished trainings: what is read of the folders of five programs, and one message for each folder that is unusable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from harness.cli import main
from harness.conformance.adapter_files import corpus
from harness.errors import Exit
from harness.records.imported import Imported, LossAgreement
from harness.runner.tool_layouts import FinishedRun
from support import finished_runs


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the tiny Llama."""
    from harness.assets import generated

    generated.tiny_llama(folder := tmp_path_factory.mktemp("base"))
    return folder


def facts(folder: Path, checkpoint: int | None = None) -> Imported:
    return FinishedRun.find(folder, checkpoint).facts()


@pytest.mark.parametrize("program", finished_runs.LAYOUTS)
def test_each_layout_gives_its_program_its_adapter_and_its_log(program: str, base: Path, tmp_path: Path) -> None:
    found = facts(finished_runs.LAYOUTS[program](tmp_path / "run", base))
    assert found.tool == program
    assert [(entry.step, entry.loss) for entry in found.logged] == list(
        zip((10, 20, 30, 40), finished_runs.LOSSES, strict=True)
    )
    assert found.base_named == str(base)
    assert found.checkpoint == (40 if program == "ms-swift" else None)


def test_facts_that_only_some_programs_write(base: Path, tmp_path: Path) -> None:
    found = {name: facts(make(tmp_path / name, base)) for name, make in finished_runs.LAYOUTS.items()}
    quantised = {name for name, one in found.items() if "quantisation of the base in training" not in one.unknown}
    assert quantised == {"Axolotl 0.19.0", "LLaMA-Factory"}
    assert found["Axolotl 0.19.0"].settings["load_in_4bit"] is True
    assert found["LLaMA-Factory"].settings["learning_rate"] == 5e-5
    assert {name for name, one in found.items() if "peak memory" not in one.unknown} == {"ms-swift"}
    unquantised = {name for name, one in found.items() if "logits over the quantised base" not in one.unknown}
    assert unquantised.isdisjoint(quantised)
    assert found["ms-swift"].settings["peak memory in the log, GiB"] == 1.5
    assert all("order of the training data" in one.unknown for one in found.values())


def test_an_earlier_checkpoint_has_the_log_up_to_it(base: Path, tmp_path: Path) -> None:
    folder = finished_runs.llama_factory(tmp_path / "run", base)
    finished_runs.adapter(folder / "checkpoint-20", base, scale=0.5)
    early, last = facts(folder, 20), facts(folder)
    assert [entry.step for entry in early.logged] == [10, 20]  # of the log of the whole training
    assert early.adapter_sha256 != last.adapter_sha256
    assert facts(folder / "checkpoint-20").checkpoint == 20


def test_checkpoints_are_ordered_by_number(base: Path, tmp_path: Path) -> None:
    folder = finished_runs.ms_swift(tmp_path / "run", base)
    shutil.copytree(folder / "checkpoint-40", folder / "checkpoint-100")
    assert FinishedRun.find(folder).checkpoint == 100


def _broken(name: str, folder: Path, base: Path) -> list[str]:
    """Write an unusable folder. Return the arguments after it."""
    if name == "no folder":
        return []
    if name in ("no adapter", "only a pickle"):
        folder.mkdir()
        if name == "only a pickle":
            (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
            (folder / "adapter_config.json").write_text("{}")
        return []
    finished_runs.trl(folder, base)
    if name == "no such checkpoint":
        return ["--checkpoint", "30"]
    if name == "no config":
        (folder / "adapter_config.json").unlink()
    if name == "torn state":
        finished_runs.state(folder)
        text = (folder / "trainer_state.json").read_text()
        (folder / "trainer_state.json").write_text(text[: len(text) // 2])
    if name == "no log":
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": 3}))
    if name == "base elsewhere":
        finished_runs.adapter(folder, base, base_model_name_or_path="/models/of/another/machine")
    if name == "no base":
        finished_runs.adapter(folder, base, base_model_name_or_path=None)
    if name == "replaced modules":
        finished_runs.adapter(folder, base, modules_to_save=["lm_head"])
    if name == "encoder":
        return ["--model", "minilm-l6"]
    if name == "unknown task":
        return ["--task", "sst-3"]
    return []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no folder", "no such folder"),
        ("no adapter", "there is no adapter_model.safetensors and no adapter_config.json"),
        ("only a pickle", "adapter_model.bin is a pickle"),
        ("no config", "there is no adapter_config.json"),
        ("no such checkpoint", "there is no checkpoint-30\n  hint: it has 20, 40"),
        ("torn state", "trainer_state.json: is not JSON"),
        ("no log", "log_history is not a list"),
        ("base elsewhere", "'/models/of/another/machine' is no folder on this machine"),
        ("no base", "its config names no base\n  hint: name the base by --model"),
        ("replaced modules", "also replaces modules or biases"),
        ("encoder", "minilm-l6 is an encoder"),
        ("unknown task", "unknown task `sst-3`"),
    ],
)
def test_an_unusable_folder_gives_one_message(
    name: str, says: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    arguments = _broken(name, folder, base)
    assert main(["import", str(folder), *arguments, "--out", str(tmp_path / "out")]) == Exit.USAGE
    err = capsys.readouterr().err
    assert says in err
    assert "hint:" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_not_imported(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished_runs.trl(tmp_path / "run", corpus.folder() / "bases" / "llama")
    code = main(["import", str(folder), "--model", str(base), "--out", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert code == Exit.FAIL, out
    assert "other-base" in out
    assert "not imported" in out
    assert not (tmp_path / "out").exists()


def test_the_loss_belongs_to_the_log_within_its_second_half_and_the_margin() -> None:
    def contradiction(evaluated: float) -> str:
        return LossAgreement(evaluated=evaluated, margin=0.3, lowest=3.0, highest=3.4).contradiction

    assert not contradiction(2.71)
    assert not contradiction(3.69)
    assert "4.6" in contradiction(4.6)
    assert "1" in contradiction(1.0)
    assert not LossAgreement(because="there is no task").contradiction
