"""The command: what goes where, what it exits with, what it imports."""

from __future__ import annotations

import errno
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click
import pytest

from harness.claims import claim_file
from harness.claims import explain as claim_explanations
from harness.cli import app, catalog, listing, main, topics
from harness.conformance.findings import defects
from harness.errors import EXITS, Exit, HarnessError
from harness.methods.peft_config import UNREFERENCED
from harness.methods.spec import methods
from harness.records import store
from harness.records.record import Optimizer, Record, Status, Training
from harness.report import plan_table
from harness.runner.executors.local import Local
from harness.suites import loader, tasks
from support import recorded_run

COMMAND = (sys.executable, "-m", "harness.cli")


HEAVY = {"torch", "pydantic", "pandas", "jinja2", "rich", "numpy", "yaml", "reference"}
VERBS = [
    *([name] for name in app.commands.commands),
    *(
        [group.name, name]
        for group in app.commands.commands.values()
        if isinstance(group, click.Group)
        for name in group.commands
    ),
]


def test_help_imports_nothing_heavy() -> None:
    # Asserted on modules, not on seconds: machines differ, and these are what would make it slow.
    code = (
        "import sys\nfrom harness.cli import main\n"
        f"for verb in {[[], *VERBS]!r}:\n"
        "    code = main([*verb, '--help'])\n"
        f"    heavy = {HEAVY!r} & set(sys.modules)\n"
        "    if heavy or code: sys.exit(f'{verb}: exit code {code}, imports {heavy}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Usage: peft-harness") == len(VERBS) + 1


def test_help_names_every_exit_code() -> None:
    text = app.commands.get_help(click.Context(app.commands, info_name="peft-harness"))
    assert all(f"  {int(code)}  " in text for code in Exit)


def test_no_verb_shows_the_help_and_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == Exit.USAGE
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("Usage: peft-harness")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == Exit.PASS
    assert capsys.readouterr().out.startswith("peft-harness 0.")


@pytest.mark.slow
def test_list_shows_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == Exit.PASS
    printed = capsys.readouterr()
    assert printed.err == ""
    assert [line.split()[0] for line in printed.out.splitlines() if line[:1].isalpha()] == list(catalog.KINDS)
    assert max(map(len, printed.out.splitlines())) <= 100
    assert catalog.KINDS == listing.KINDS


def test_list_of_a_kind_has_headings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "tasks"]) == Exit.PASS
    kind, head, *rows = capsys.readouterr().out.splitlines()
    assert (kind, head.split()) == ("tasks", ["name", "data", "labels", "test"])
    assert len(rows) == len(tasks.names())


def test_doctor_names_the_models_and_data_of_quick_only(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    named = {row["subject"] for row in json.loads(capsys.readouterr().out)["findings"]}
    assert {"minilm-l6", "smollm2-135m-instruct", "movie-reviews"} <= named
    assert not {"llama-3.1-8b", "gsm8k"} & named


def test_list_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "methods", "implementations", "--json"]) == Exit.PASS
    document = json.loads(capsys.readouterr().out)
    assert list(document) == ["schema", "methods", "implementations", "broken"]
    assert [row["name"] for row in document["methods"]] == [*methods(), *UNREFERENCED]
    lora = next(row for row in document["methods"] if row["name"] == "lora")
    assert lora["config"]["rank"]["default"] == methods()["lora"].fields["rank"].default
    assert "reference" in lora["implementations"]


def test_list_checks_are_those_of_the_conformance_suite(capsys: pytest.CaptureFixture[str]) -> None:
    checks = pytest.importorskip("harness.conformance.checks")
    assert main(["list", "checks", "--json"]) == Exit.PASS
    listed = {row["name"]: row["summary"] for row in json.loads(capsys.readouterr().out)["checks"]}
    assert set(listed) == set(checks.every())
    assert all(listed.values())


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "smoke", "--only", "method=lora"]) == Exit.PASS
    printed = capsys.readouterr()
    assert printed.err == "predicting the memory of 3 Cells ...\n"
    assert "3 Cells; " in printed.out
    assert "time unknown" in printed.out
    assert "same-losses: both implementations of LoRA" in printed.out


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(
    "words", [["--only", "method=lora", "--only", "dtype=float64"], ["--only", "method=lora,dtype=float64"]]
)
def test_only_given_twice_is_one_expression(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "smoke", "--json", *words]) == Exit.PASS
    planned = [c["cell"] for c in json.loads(capsys.readouterr().out)["cells"]]
    assert [(c["method"], c["dtype"]) for c in planned] == [("lora", "float64")]


@pytest.mark.nightly
@pytest.mark.usefixtures("forks")
def test_plan_json_holds_whole_cells(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "smoke", "--json"]) == Exit.PASS
    document = json.loads(capsys.readouterr().out)
    cells = loader.load("smoke").plan.cells
    assert [c["cell_id"] for c in document["cells"]] == [c.cell_id for c in cells]
    assert [c["cell"] for c in document["cells"]] == [c.model_dump(mode="json") for c in cells]


def test_plan_reads_the_newest_record_and_guesses_nothing(tmp_path: Path) -> None:
    suite = loader.load("smoke")
    plan = suite.plan
    torn, known, failed = plan.cells[:3]
    for n, seconds in enumerate([9.0, 7.0]):
        _put(tmp_path / f"run{n}", recorded_run.record("reference", known, duration_s=seconds), mtime=n)
    good = recorded_run.record("fused", failed)
    _put(tmp_path / "run0", recorded_run.failed(good, Status.OOM, duration_s=3.0), mtime=0)
    (tmp_path / "run1" / "cells" / f"{torn.cell_id}.1.json").write_text("{", encoding="utf-8")
    document = plan_table.planning(suite, plan, tmp_path)
    last = [cell["last"] for cell in document["cells"]]
    assert (last[0], last[1]["duration_s"], last[2]["status"], last[3]) == (None, 7.0, "oom", None)
    assert document["estimate"]["seconds"] == 7.0
    assert (document["estimate"]["cells"], document["estimate"]["of"]) == (1, 4)
    text = "\n".join(plan_table.lines(document))
    cut = plan_table.lines(document, most=3)
    assert cut[5] == "  ... and 1 more Cell: --all shows them"
    assert [line.split()[0] for line in cut[2:5]] == [cell.cell_id for cell in plan.cells[:3]]
    assert cut[6:] == text.splitlines()[6:]
    times = [line.rsplit("  ", 1)[-1].strip() for line in text.splitlines()[2:6]]
    assert times == ["-", "7.0 s", "oom after 3.0 s", "-"]
    assert "time unknown for the other 3" in text
    # A report shows the part above the imports, which is far less.
    assert "last time, peak of a whole process " in text


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lora", "arXiv:2106.09685"),
        ("gradient", "check gradient"),
        ("lora/gradient/float32/warm", "check gradient"),
        ("lora/multi-adapter/float32/trained", "the row's own adapter"),
        ("lora/moved/float32/trained", "kept its first value"),
        ("suite", "each has a file and a line"),
        ("oom", "ran out of memory"),
        ("4", "exit code 4"),
        ("4", "SIGTERM"),
        ("Cell", "one combination of a suite's axes"),
        ("tied", "smaller than the run can detect"),
        ("busy", "CPU"),
        ("Record", "one attempt at a Cell"),
        ("recipe", "a Cell without its seed"),
        ("cannot be told apart", "smaller than the run can detect"),
        ("parity", "the same numbers as the reference"),
        ("conformance", "the same numbers as the reference"),
        ("share of the truth", "the projection on the right result"),
        ("plug-in", "the group harness.implementations"),
        ("plug-in", "from harness.testing import wrap_layers"),
        ("Adapted", "def after_step(self, step: int)"),
        ("entry point", '@implements("lora", name="acme")'),
        ("conforms", "what its Method defines"),
        ("pass", "a verdict"),
        ("claims", "A claim file is YAML"),
        ("history add", "command history add"),
        ("memory", "prediction"),
        ("error", "status error"),
        ("optimizer", "one of adamw, adamw-8bit, paged-adamw, paged-adamw-8bit"),
        ("paged-adamw", "arXiv:2305.14314"),
        ("accumulate", "micro-batches in each optimizer step"),
        ("checkpointing", "default: false"),
        ("lr_ratio", "arXiv:2402.12354"),
        ("compile", "torch.compile"),
        ("LoRA", "arXiv:2106.09685"),
        ("NF4", "4-bit NormalFloat"),
        ("nf4-dq", "double quantisation"),
        ("rank", "lora: a whole number, default 8"),
        ("rank", "inner width"),
        ("lora", "first.B: float32 [96, 3], all 0 at the start"),
        ("adalora", "after_step: Update the averages"),
        ("multi_lora_linear", "As: a list of 2: float32 [4, 16]; float32 [8, 16]"),
        ("nf4_quantize", "packed: uint8 ["),
        ("rounding", "magnitude: of the same order"),
        ("history", "`history reset` accepts a level"),
        ("settle", "`history settle` confirms"),
        ("canary", "a comparison of a revision with itself"),
        ("LORA-10000X", "claim lora-10000x"),
        ("untrained", "the reason names the tensor"),
        ("calls", "by a pickled copy"),
        ("lora", "copy.deepcopy"),
        ("lora", "`embed_scale`"),
        ("galore", "M: float32 [3, 128]"),
        ("vera", "deep: ten layers to adapt."),
        ("vera", "zero-rows: every second row is 0."),
        ("lorafa_step", "the pseudo-inverse of A A^T + 1e-8 I"),
        ("lora", "LoraConv: A frozen convolution"),
        ("galore", "has an entry in `tensors()` under each of its names"),
    ],
)
def test_explain(name: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", name]) == Exit.PASS
    assert says in capsys.readouterr().out


@pytest.mark.parametrize("name", ["lora", "lamb8bit_step"])
def test_the_differences_from_the_paper_come_before_the_cases(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", name]) == Exit.PASS
    shown = capsys.readouterr().out
    assert (
        0 < shown.index("differences from the paper, and what it leaves open") < shown.index("cases that `check` tries")
    )


@pytest.mark.parametrize("name", list(app.commands.commands))
def test_every_command_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", name]) == Exit.PASS
    assert f"options: `peft-harness {name} --help`" in capsys.readouterr().out


def test_a_kind_of_names_is_listed_by_another_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "operations"]) == Exit.USAGE
    assert "hint: `peft-harness list operations` lists them" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "near"), [("lorra", "lora"), ("lora-10000y", "lora-10000x"), ("foobar", "")])
def test_only_near_names_are_suggested_and_no_file_of_claims_or_defects_is_read(
    name: str, near: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for reader in (claim_file, defects):
        monkeypatch.setattr(
            reader, "load" if reader is claim_file else "known", lambda *_: pytest.fail("it read a file")
        )
    assert main(["explain", name]) == Exit.USAGE
    (hint,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  hint: ")]
    assert hint == f"  hint: did you mean `{near}`?" if near else hint.startswith("  hint: there are methods")


@pytest.mark.slow
def test_every_claim_can_be_explained() -> None:
    for path in claim_file.paths(claim_file.names()):
        assert {claim.id for claim in claim_file.load([path])} <= claim_explanations.claim_ids(), path.name


def test_a_check_that_is_called_like_a_method_is_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "lora/frozen/float32/trained"]) == Exit.PASS
    said = capsys.readouterr().out
    assert "a parameter of the model that must not train" in said
    assert "method frozen" not in said
    assert main(["explain", "frozen"]) == Exit.PASS
    assert "method frozen" in capsys.readouterr().out


@pytest.mark.slow
def test_every_optimizer_and_every_key_of_training_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(topics.glossary()["optimizer"]) == set(get_args(Optimizer))
    for key in (*get_args(Optimizer), *Training.model_fields):
        assert main(["explain", key]) == Exit.PASS
        assert len(capsys.readouterr().out.splitlines()) > 1, key


def test_every_exit_code_and_status_is_explained() -> None:
    assert set(EXITS) == set(Exit)
    assert set(topics.glossary()["status"]) == set(Status)


def test_run_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = pytest.importorskip("harness.runner.run")
    seen: dict[str, Any] = {}
    monkeypatch.setattr(runner, "run_suite", lambda suite, **options: seen.update(options, suite=suite) or Exit.FAIL)
    argv = ["run", "smoke", "--out", "x", "--only", "lora", "--resume", "r", "--device", "cpu", "--timeout", "5"]
    assert main([*argv, "--strict"]) == Exit.FAIL
    expected = {"suite": "smoke", "out": Path("x"), "only": "lora", "resume": "r", "device": "cpu", "timeout": 5.0}
    assert isinstance(local := seen.pop("executor"), Local)
    assert local.jobs == 1
    assert seen == {**expected, "strict": True, "own_gates": False}
    seen.clear()
    main(["run", "smoke", "--jobs", "3", "--own-gates"])
    assert seen["own_gates"] is True
    assert (seen["timeout"], seen["strict"], seen["executor"].jobs) == (runner.DEFAULT_TIMEOUT_S, False, 3)


@pytest.mark.parametrize("timeout", ["nan", "inf", "-inf", "-1", "0", "1e400", "soon"])
def test_a_time_out_that_no_clock_can_wait_for(timeout: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "smoke", "--timeout", timeout]) == Exit.USAGE
    said = capsys.readouterr().err
    assert said.startswith("peft-harness: run: Invalid value for '--timeout': ")
    assert "hint: see `peft-harness run --help`" in said
    assert said.count("\n") == 2


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["gate", "--pairs", "main"], "gate"),
        (["bench", "--op"], "bench"),
        (["history", "add", "--nothing"], "history add"),
        (["--nothing"], ""),
        (["--nothing", "run"], ""),
        (["no-command", "run"], ""),
    ],
)
def test_the_hint_of_wrong_use_names_the_help_of_the_command(
    words: list[str], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == Exit.USAGE
    assert f"hint: see `{f'peft-harness {command}'.strip()} --help`" in capsys.readouterr().err


def _commands(group: click.Group, path: str = "peft-harness") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


@pytest.mark.parametrize(
    ("path", "command"),
    [(path, command) for path, command in _commands(app.commands) if any(one.required for one in command.params)],
)
def test_a_missing_argument_is_answered_with_an_example_that_works(
    path: str, command: click.Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(path.split()[1:]) == Exit.USAGE
    said = capsys.readouterr().err
    example = said.partition("hint: e.g. `")[2].partition("`; see `")[0]
    assert said.endswith(f"`; see `{path} --help`\n")
    assert example.startswith(f"{path} ")
    words = shlex.split(example.removeprefix(path))
    assert command.make_context(path, words).params  # raises an error for words that the command does not take
    assert main([*path.split()[1:], "--help"]) == Exit.PASS
    assert f"Example: {example}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list", "method"], "Did you mean 'methods'?"),
        (["report", "latest", "--format", "htm"], "Did you mean 'html'?"),
        (["env", "creat"], "Did you mean 'create'?"),
        (["explain", "lora", "dora"], "hint: explain one name at a time, e.g. `peft-harness explain dora`"),
        (["claims", "lroa"], "hint: did you mean `lora`? Or use --file FILE for your own"),
        (["fit", "lama-7b", "--memory", "1GiB"], "hint: did you mean `llama-7b`? Or name a folder"),
        (["env", "remove", "torchoa"], "hint: `peft-harness env list` shows which ones could be made"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_closest_one(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PEFT_HARNESS_CACHE", str(tmp_path))
    assert main(words) == Exit.USAGE
    assert said in capsys.readouterr().err


_BUG = """
import sys
from harness.cli import topics
from harness.cli import main
def explained(name):
    raise {raised}
topics.explain = explained
sys.exit(main(["explain", "lora"]))
"""


@pytest.mark.slow
def test_a_bug_of_the_harness_is_no_finding() -> None:
    code = _BUG.format(raised="ZeroDivisionError('by nought')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == Exit.INFRASTRUCTURE
    assert "Traceback" in done.stderr
    assert "in explained" in done.stderr
    message = done.stderr[done.stderr.index("peft-harness: ") :]
    assert message.startswith("peft-harness: internal error in peft-harness: ")
    assert (
        "ZeroDivisionError: by nought\n  hint: please report it with the lines above; no Record was written" in message
    )
    assert done.stderr.count("by nought") == 2


@pytest.mark.slow
@pytest.mark.parametrize("raised", ["KeyboardInterrupt", "SystemExit(9)"])
def test_what_is_no_bug_is_not_called_one(raised: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _BUG.format(raised=raised)], capture_output=True, text=True, check=False
    )
    assert done.returncode == (9 if "9" in raised else Exit.INFRASTRUCTURE)
    assert "bug" not in done.stderr


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (
            KeyboardInterrupt(),
            Exit.INFRASTRUCTURE,
            "peft-harness: interrupted\n  hint: the run folder, if there is one, has the finished Cells\n",
        ),
        (HarnessError("no GPU", where="cuda", hint="buy one"), 4, "peft-harness: cuda: no GPU\n  hint: buy one\n"),
    ],
)
def test_what_a_verb_raises(
    raised: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(pytest.importorskip("harness.runner.run"), "run_suite", fail)
    assert main(["run", "smoke"]) == code
    assert capsys.readouterr().err.lstrip("\n") == message


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = recorded_run.write_run(tmp_path / "run")
    assert main(["report", str(run.path), "-o", str(tmp_path / "page.html")]) == Exit.PASS
    printed = capsys.readouterr()
    assert f"report: {tmp_path / 'page.html'}" in printed.out
    assert printed.err == ""
    assert (tmp_path / "page.html").stat().st_size > 1000


@pytest.mark.parametrize("name", ["run.json", "notes.txt"])
def test_a_report_is_not_written_over_what_is_no_page(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = recorded_run.write_run(tmp_path / "run")
    before = (run.path / "run.json").read_bytes()
    assert main(["report", str(run.path), "-o", str(run.path / name)]) == Exit.USAGE
    assert f"{run.path / name} is no .html file" in capsys.readouterr().err
    assert (run.path / "run.json").read_bytes() == before


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error() -> None:
    writer = subprocess.Popen([*COMMAND, "list", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.close()
    _, said = writer.communicate()
    assert (writer.returncode, said) == (0, b"")


@pytest.mark.slow
def test_a_reader_that_leaves_in_the_middle_is_no_finding() -> None:
    code = (
        "import sys\nfrom harness.cli import topics\nfrom harness.cli import main\n"
        "def explained(name): raise BrokenPipeError\n"
        "topics.explain = explained\nsys.exit(main(['explain', 'lora']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (Exit.INFRASTRUCTURE, "")


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_behind_stdout_is_one_message() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*COMMAND, "list", "--json"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )  # fmt: skip
    first, hint = done.stderr.splitlines()
    assert (done.returncode, first.partition(": ")[2]) == (
        Exit.INFRASTRUCTURE, "standard output: cannot print: No space left on device",
    )  # fmt: skip
    assert hint.startswith("  hint: ")


@pytest.mark.parametrize("command", [["run", "smoke"], ["report", "run"], ["bench"], ["export", "run"]])
def test_an_empty_path_is_not_the_current_folder(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script with --out "$UNSET" gives one."""
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--out", ""]) == Exit.USAGE
    assert "the name is empty" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_command_is_followed_by_the_closest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chek", "reference"]) == Exit.USAGE
    assert "No such command 'chek'. Did you mean 'check'?" in capsys.readouterr().err
    assert main(["frob"]) == Exit.USAGE
    assert "Did you mean" not in capsys.readouterr().err


LONG = "x" * 300


@pytest.mark.parametrize(
    "words",
    [
        ["plan", f"{LONG}.yaml"], ["run", f"{LONG}.yaml"], ["report", LONG], ["export", LONG, "--format", "csv"],
        ["baseline", "promote", LONG, "quick", "--reason", "x"],
        ["claims", "--file", f"{LONG}.yaml"], ["history", "add", LONG], ["import", f"./{LONG}"], ["check", f"./{LONG}"],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_a_name_that_is_too_long_is_no_bug(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == Exit.USAGE
    said = capsys.readouterr().err
    assert "File name too long" in said
    assert "hint: " in said


def test_a_folder_without_permission_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(name: str) -> Path:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "secret/run.json")  # tests may run as root

    monkeypatch.setattr(store, "find_run", refuse)
    assert main(["report", "secret"]) == Exit.INFRASTRUCTURE
    assert capsys.readouterr().err.startswith(
        "peft-harness: secret/run.json: cannot be used: Permission denied\n  hint: "
    )


@pytest.mark.nightly
def test_an_ascii_terminal_is_no_error() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "NO_COLOR": "1"}
    done = subprocess.run([*COMMAND, "explain", "lora"], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\x1b[" not in done.stdout


@pytest.mark.slow
def test_report_exits_with_the_most_serious_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = recorded_run.write_run(tmp_path / "good")
    again = lambda n, r: r if n != "full" else None  # noqa: E731
    half = recorded_run.write_run(tmp_path / "half", run="half", footer=False, change=again)
    assert main(["report", str(good.path), str(half.path)]) == Exit.INFRASTRUCTURE
    assert (tmp_path / "good" / "report-with-half.html").is_file()


def _put(run: Path, record: Record, mtime: int) -> None:
    (run / "cells").mkdir(parents=True, exist_ok=True)
    path = run / "cells" / f"{record.cell_id}.1.json"
    store.write(path, record)
    os.utime(path, (mtime, mtime))
