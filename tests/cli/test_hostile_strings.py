"""Whatever a Record, a plug-in, a suite or a claim file holds, a command prints printable text in lines of its own."""

from __future__ import annotations

import importlib
import io
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from harness.assets import generated
from harness.assets.environments.folder import EnvironmentFile
from harness.assets.environments.table import EnvironmentSpec
from harness.claims.judge import ClaimVerdict, JudgedClaim
from harness.cli import app, main, topics
from harness.cli import check_run as checking
from harness.conformance.findings.outcomes import CheckOutcome
from harness.conformance.findings.report import CheckReport
from harness.console import align_columns, print_json, print_lines
from harness.errors import Exit, HarnessError
from harness.records.record import Cell, CheckResult, Outcome, Record, Status
from harness.runner import progress
from support import finished_runs, histories, recorded_run
from support.hostile import HOSTILE, assert_safe, poisoned

SHOWN = r"\x1b[2J"
"""How a part of HOSTILE looks in a safe text."""

Printed = Callable[..., str]
FIXED = ("cell", "cell_id", "run", "suite_file", "sha256", "items")


@pytest.fixture
def printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Printed:
    """Return a function that runs a command in a folder of its own, and returns stdout and stderr, which must be safe."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str, code: int | None = None) -> str:
        capsys.readouterr()
        got = main(list(arguments))
        captured = capsys.readouterr()
        text = captured.out + captured.err
        assert_safe(text)
        assert code is None or got == code, text
        return text

    return command


@pytest.fixture
def hostile_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run in which every text is hostile that may be any text: of Cells, Records, questions and the environment."""
    sound = recorded_run.cells()
    evil = {name: cell.model_copy(update=_names(cell)) for name, cell in sound.items()}
    monkeypatch.setattr(recorded_run, "cells", lambda seed=0: evil)
    monkeypatch.setattr(recorded_run, "losses", lambda cell: [0.5] * cell.training.steps)

    def change(name: str, good: Record) -> Record | None:
        if name == "head":
            return None
        if name == "nf4":
            good = recorded_run.failed(good, Status.ERROR, because=HOSTILE)
        if name == "full":
            failing = CheckResult(check="full/forward/float32/warm", outcome=Outcome.FAIL, detail=HOSTILE)
            good = recorded_run.failed(good, Status.NONCONFORMING, checks=[failing])
        return poisoned(good, FIXED)

    environment = poisoned(recorded_run.environment())
    more = {"title": HOSTILE, "about": HOSTILE, "argv": [HOSTILE], "environment": environment, "suite": "quick"}
    run = recorded_run.write_run(tmp_path / "run", change=change, asked=_asked, **more)
    (run.path / "cells" / f"{'0' * 16}.1.json").write_text(json.dumps({HOSTILE: HOSTILE}), encoding="utf-8")
    return run.path


def _names(cell: Cell) -> dict[str, str]:
    return {"model": cell.model + HOSTILE, "task": cell.task + HOSTILE, "implementation": cell.implementation + HOSTILE}


def _asked(cells: dict[str, Cell]) -> list:
    return [one.model_copy(update={"says": HOSTILE}) for one in COMPARISONS(cells)]


COMPARISONS = recorded_run.comparisons


@pytest.mark.slow
def test_report_and_export(hostile_run: Path, tmp_path: Path, printed: Printed) -> None:
    for runs in ([str(hostile_run)], [str(hostile_run), str(hostile_run)]):
        assert SHOWN in printed("report", *runs, "-o", str(tmp_path / "page.html"))
    for form in ("markdown", "csv", "json"):
        assert "1b" in printed("report", str(hostile_run), "--format", form)
    assert SHOWN in printed("export", str(hostile_run), "--format", "csv")


@pytest.mark.slow
def test_gate_and_baseline(
    hostile_run: Path, tmp_path: Path, printed: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed("baseline", "promote", str(hostile_run), "evil", "--reason", HOSTILE, "--author", HOSTILE, code=Exit.USAGE)
    sound = recorded_run.write_run(tmp_path / "sound", run="sound")
    printed("baseline", "promote", str(sound.path), "ok", "--reason", HOSTILE, "--author", HOSTILE, code=Exit.PASS)
    assert SHOWN in printed("baseline", "list")
    assert SHOWN in printed("gate", str(hostile_run), "--baseline", "ok", "--all", "--annotations")
    assert "\\u001b[2J" in printed("gate", str(hostile_run), "--baseline", "ok", "--json")


@pytest.mark.slow
def test_history(hostile_run: Path, tmp_path: Path, printed: Printed) -> None:
    folder = ["--dir", str(tmp_path / "history")]
    printed("history", "add", str(hostile_run), *folder)
    assert SHOWN in printed("history", "show", *folder)
    printed("history", "show", "--nights", *folder)
    printed("history", "detect", *folder)
    slower = histories.noisy(1, histories.regressed)
    cells = {i: cell.model_copy(update=_names(cell)) for i, cell in histories.CELLS.items()}
    histories.write(tmp_path / "long", cells, slower, nights=14, place=lambda _: {**histories.PLACE, "CPU": HOSTILE})
    folder = ["--dir", str(tmp_path / "long")]
    what = [histories.FIRST, "step_s", "--night", histories.night(histories.SLOWER), *folder]
    why = ["--reason", HOSTILE, "--author", HOSTILE]
    told = ["--verdict", "regressed", "--evidence", HOSTILE, "--author", HOSTILE]
    assert SHOWN in printed("history", "confirm", *what, *told)
    assert SHOWN in printed("history", "detect", *folder)
    assert SHOWN in printed("history", "reset", *what, *why)
    (tmp_path / "long" / "2026-03-01.jsonl").write_text(f"{json.dumps(HOSTILE)}\n", encoding="utf-8")
    printed("history", "detect", *folder)


def test_claims(tmp_path: Path, printed: Printed) -> None:
    texts = dict.fromkeys(("version", "source", "sentence", "headline", "under", "ours", "how", "why", "note"), HOSTILE)
    fields = {"paper": "lora", "tier": "exact", "printed": HOSTILE, "rule": HOSTILE, "tried": []}
    rows = [
        JudgedClaim(id=f"lora-{verdict.value}", verdict=verdict, **texts, **fields).model_dump(mode="json")
        for verdict in ClaimVerdict
    ]
    ledger = {"schema": 3, "kind": "claims", "software": {HOSTILE: HOSTILE}, "claims": rows}
    (tmp_path / "claims.json").write_text(json.dumps(ledger), encoding="utf-8")
    assert SHOWN in printed("claims", "--show", "claims.json")
    file = (
        'paper: mine\ntitle: "a\\e[2J"\nversion: v1\nclaims:\n  - {id: "x\\e[2J\\n✓ pass: forged", printed: "\\e[2J"}\n'
    )
    (tmp_path / "mine.yaml").write_text(file, encoding="utf-8")
    assert "\\x1b" in printed("claims", "--file", "mine.yaml", code=Exit.USAGE)


SUITE = """
suite: evil
title: "a title \\e[2J\\u202E\\n✓ pass: forged, everything conforms"
about: text
comparisons:
  - {{same-losses: a, as: exact, says: "the same \\e[2J\\n✓ pass: forged, everything conforms"}}
matrix:
  - model: {model}
    task: toy-sentiment
    training: {{steps: 4, batch: 2, lr: 1e-3}}
    evaluation: {{items: 8, batch: 4}}
    config: {{rank: 4, alpha: 8, targets: [q_proj]}}
    cells:
      - {{id: a, method: lora}}
      - {{id: exact, method: lora, dtype: float64}}
"""


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_plan(tmp_path: Path, printed: Printed) -> None:
    (tmp_path / "evil.yaml").write_text(SUITE.format(model="tiny-llama"), encoding="utf-8")
    assert SHOWN in printed("plan", "evil.yaml", code=Exit.PASS)


def test_mistakes_in_a_suite(tmp_path: Path, printed: Printed) -> None:
    (tmp_path / "evil.yaml").write_text(SUITE.format(model='"\\e[2J\\n✓ pass: forged"'), encoding="utf-8")
    assert "\\x1b" in printed("plan", "evil.yaml", code=Exit.USAGE)
    (tmp_path / "evil.yaml").write_bytes(b"suite: \x1b[2J\n")
    printed("plan", "evil.yaml", code=Exit.USAGE)
    (tmp_path / "evil.yaml").write_text(SUITE.format(model="tiny-llama"), encoding="utf-8")
    printed("plan", "evil.yaml", "--only", HOSTILE, code=Exit.USAGE)


def test_check(printed: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome(check: str, name: str = HOSTILE) -> CheckOutcome:
        result = CheckResult(check=f"lora/{check}/float32/warm", outcome=Outcome.FAIL, detail=HOSTILE)
        return CheckOutcome(
            implementation=name, kind="method", target="lora", dtype="float32", case=HOSTILE, result=result
        )

    report = CheckReport(
        tried=[outcome("forward"), outcome("gradient"), outcome("forward", "acme")], skipped={HOSTILE: HOSTILE},
        complaints=[HOSTILE], broken={HOSTILE: HOSTILE}, defects=[], software={}, untried=[HOSTILE],
    )  # fmt: skip
    monkeypatch.setattr(checking, "judge", lambda _: report)
    text = printed("check", code=Exit.FAIL)
    assert SHOWN in text
    assert [line for line in text.splitlines() if line.startswith("FAIL acme ")]
    assert text.count(" and 1 more: ") == 1, "failures that are alike share a line"
    assert "\\u001b[2J" in printed("check", "--json")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter whose config, keys of tensors and training log have hostile texts."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    generated.tiny_llama(base)
    finished_runs.adapter(folder, base, target_modules=["q_proj", HOSTILE], rank_pattern={HOSTILE: 2}, extra=HOSTILE)
    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights) | {f"base_model.model.{HOSTILE}.lora_A.weight": torch.ones(4, 4)}, weights)
    finished_runs.state(folder)
    (folder / "README.md").write_text(f"---\ntags: [{json.dumps(HOSTILE)}]\n---\n", encoding="utf-8")
    (folder / "training_args.yaml").write_text(f"learning_rate: {json.dumps(HOSTILE)}\n", encoding="utf-8")
    return folder


def test_check_and_import_of_an_adapter(adapter: Path, printed: Printed) -> None:
    assert SHOWN in printed("check", str(adapter), "--base-model", str(adapter.parent / "base"), code=Exit.FAIL)
    assert SHOWN in printed("check", str(adapter), code=Exit.FAIL)
    assert SHOWN in printed("import", str(adapter), code=Exit.FAIL)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": HOSTILE}), encoding="utf-8")
    assert "1b[2J" in printed("check", str(adapter), code=Exit.USAGE)


def test_check_of_a_server(adapter: Path, printed: Printed) -> None:
    class Evil(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = json.dumps(
                {"object": "list", "data": [{"id": HOSTILE}, {"id": "base"}], "message": HOSTILE}
            ).encode()
            self.send_response(200 if self.path.endswith("/models") else 500)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    finished_runs.adapter(adapter, adapter.parent / "base")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Evil)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    words = ["--base-model", str(adapter.parent / "base"), "--adapter", str(adapter)]
    try:
        assert "1b[2J" in printed("check", "--served", f"http://127.0.0.1:{server.server_port}", *words)
    finally:
        server.shutdown()
        server.server_close()


def test_list_of_environments(tmp_path: Path, printed: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_HARNESS_CACHE", str(tmp_path / "cache"))
    made = EnvironmentFile(
        spec=EnvironmentSpec(name="evil", requirements=["peft==1.0"], about=HOSTILE), base={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE}, packages=[HOSTILE], size=1, made=HOSTILE, installer=HOSTILE,
    )  # fmt: skip
    folder = tmp_path / "cache" / "environments" / "evil-0"
    folder.mkdir(parents=True)
    (folder / "environment.json").write_text(made.model_dump_json(), encoding="utf-8")
    assert SHOWN in printed("env", "list", code=Exit.PASS)
    assert "\\u001b[2J" in printed("env", "list", "--json", code=Exit.PASS)


@pytest.mark.nightly
def test_fit_of_a_model(tmp_path: Path, printed: Printed) -> None:
    config = {"model_type": HOSTILE, "architectures": [HOSTILE]}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    asked = ("--rank", "1", "--batch", "1", "--tokens", "8", "--formulas")
    assert "1b[2J" in printed("fit", str(tmp_path), "--memory", "1GiB", *asked)


_PLUGIN = """
import os, sys, warnings
from harness import implements
print({hostile!r})
sys.stderr.write({hostile!r})
warnings.warn({hostile!r})

@implements("frozen", name="evil")
def attach(model, config, generator):
    os.write(2, {hostile!r}.encode())
    raise RuntimeError({hostile!r})
"""


@pytest.fixture
def plug_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a plug-in that prints, warns and raises hostile texts, and one that cannot be imported."""
    site = tmp_path / "site"
    site.mkdir()
    for name, code in (("evil", _PLUGIN.format(hostile=HOSTILE)), ("torn", f"raise ValueError({HOSTILE!r})")):
        (site / f"{name}_module.py").write_text(code, encoding="utf-8")
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
        points = f"[harness.implementations]\n{name} = {name}_module:attach\n"
        (info / "entry_points.txt").write_text(points, encoding="utf-8")
        monkeypatch.delitem(sys.modules, f"{name}_module", raising=False)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", f"{site}:{Path(app.__file__).parents[2]}")
    importlib.invalidate_caches()


@pytest.mark.usefixtures("plug_ins")
def test_list_and_doctor_load_plug_ins(printed: Printed) -> None:
    assert f"| zz{SHOWN}" in printed("list", "implementations")
    assert "evil" in printed("list", "implementations", "--json")
    assert "torn" in printed("doctor")
    printed("doctor", "--verbose")


@pytest.mark.nightly
@pytest.mark.usefixtures("plug_ins")
def test_check_of_a_plug_in_that_raises(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "harness.cli", "check", "evil", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, text=True, encoding="utf-8", check=False)
    assert done.returncode == Exit.FAIL, done.stderr
    assert_safe(done.stdout + done.stderr)
    assert "| " not in done.stderr, "what a plug-in prints is shown only if its process fails"
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FAIL evil")]
    assert re.search(r" and \d+ more: raised RuntimeError: zz", line)


UNKNOWN = [
    [HOSTILE], ["run", HOSTILE], ["run", "smoke", "--only", HOSTILE], ["run", "smoke", "--timeout", HOSTILE],
    ["report", HOSTILE], ["plan", HOSTILE], ["explain", HOSTILE], ["explain", f"lora/{HOSTILE}/float32/warm"],
    ["list", HOSTILE], ["check", HOSTILE, "--method", HOSTILE, "--op", HOSTILE, "--dtype", HOSTILE],
    ["check", "--junit", f"/{HOSTILE}/x"], ["bench", "--op", HOSTILE], ["bench", "--out", "/dev/null/" + HOSTILE],
    ["claims", HOSTILE], ["claims", "--file", HOSTILE], ["claims", "--show", HOSTILE],
    ["fit", HOSTILE, "--memory", HOSTILE], ["fit", "llama-7b", "--memory", "1GiB", "--method", HOSTILE],
    ["gate", HOSTILE, "--baseline", HOSTILE], ["gate", "--pairs", HOSTILE, HOSTILE],
    ["export", HOSTILE, "--format", "csv"],
    ["baseline", "promote", HOSTILE, HOSTILE, "--reason", "x"], ["history", "show", "--dir", HOSTILE],
    ["history", "add", HOSTILE],
    ["history", "reset", "x", "x", "--night", HOSTILE, "--reason", HOSTILE, "--dir", HOSTILE],
    ["doctor", HOSTILE],
    ["history", "confirm", HOSTILE, HOSTILE, "--night", HOSTILE, "--verdict", HOSTILE, "--evidence", "x", "--author", "x"],
    ["env", "create", HOSTILE], ["env", "create", "--with", HOSTILE], ["env", "create", "x", "--file", HOSTILE],
    ["env", "remove", HOSTILE], ["env", "repair", HOSTILE],
    ["import", HOSTILE],
    ["check", f"./{HOSTILE}"], ["check", f"{HOSTILE}.safetensors", "--base-model", HOSTILE],
    ["check", "--with", HOSTILE], ["check", "--served", HOSTILE, "--base-model", HOSTILE, "--adapter", HOSTILE],
    ["bench", "--step", HOSTILE], ["night", "--device", "cpu", "--only", HOSTILE], ["kit", "x", "--size", HOSTILE],
    ["fit", HOSTILE, "--memory", "1GiB", "--rank", "1", "--batch", "1"],
    ["fit", "llama-7b", "--memory", "1GiB", "--rank", "1", "--batch", "1", "--dtype", HOSTILE],
]  # fmt: skip


@pytest.mark.parametrize(
    "arguments", UNKNOWN,
    ids=lambda arguments: " ".join(arguments).partition("zz")[0] or "(none)",
)  # fmt: skip
def test_unknown_names(arguments: list[str], printed: Printed) -> None:
    text = printed(*arguments)
    assert "1b[2J" in text


def test_every_command_is_fed() -> None:
    assert {arguments[0] for arguments in UNKNOWN} >= set(app.commands.commands)
    env = app.commands.commands["env"]
    assert {arguments[1] for arguments in UNKNOWN if arguments[0] == "env"} | {"list"} >= set(env.commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("raised", [HarnessError(HOSTILE, where=HOSTILE, hint=HOSTILE, details=[HOSTILE]), HOSTILE])
def test_errors(raised: HarnessError | str, printed: Printed, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> str:
        raise raised if isinstance(raised, HarnessError) else HarnessError(raised) from ValueError(HOSTILE)

    monkeypatch.setattr(topics, "explain", fail)
    assert SHOWN in printed("explain", "lora", code=Exit.INFRASTRUCTURE)


def test_a_bug_of_the_harness(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bug = ZeroDivisionError(HOSTILE)
    bug.__cause__ = ValueError(HOSTILE)
    with pytest.raises(SystemExit):
        app.report_bug(type(bug), bug, None)
    text = capsys.readouterr().err
    assert_safe(text)
    assert "| ZeroDivisionError: zz" in text
    assert all(line.startswith(("| ", "peft-harness: ", "  hint: ")) for line in text.splitlines() if line != "|")


def test_live_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=200, highlight=False)
    monkeypatch.setattr(progress, "_Console", lambda **_: console)
    cell = recorded_run.cells()["fused"]
    cell = cell.model_copy(update=_names(cell))
    record = recorded_run.failed(recorded_run.record("fused", cell), because=HOSTILE)
    live = progress.Progress([cell])
    live.begin(cell)
    live.event(cell, {"event": "phase", "name": HOSTILE})
    live.fetching(HOSTILE, 0, None)
    live.end(record)
    live.close()
    drawn = re.sub(r"\x1b\[\??[\d;]*[A-Za-z]", "", terminal.getvalue().replace("\r", ""))  # what rich itself writes
    assert SHOWN in drawn
    assert_safe(drawn)


def test_json_escapes_what_a_terminal_would_obey(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({HOSTILE: [HOSTILE]})
    text = capsys.readouterr().out
    assert_safe(text)
    assert json.loads(text) == {HOSTILE: [HOSTILE]}


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_table_keeps_to_the_width_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [["name", "number", "words"], ["n" * 200, "1" * 10, "w" * 15], [HOSTILE, "2", "short"]]
    assert len(align_columns(rows, right=[1])[1]) > 200, "nothing is cut in a file or a pipe"
    monkeypatch.setattr(sys, "stdout", _Terminal())
    monkeypatch.setenv("COLUMNS", "60")
    lines = align_columns(rows, right=[1])
    assert max(map(len, lines)) <= 60
    assert re.match(r"  n+…n+  1111111111  w+$", lines[1])
    assert_safe("\n".join(lines))


@pytest.mark.parametrize(
    ("line", "coloured"),
    [
        ("✓ pass: all conform", "\x1b[32m✓ pass\x1b[0m: all conform"),
        ("lora  acme  FAIL 1/3  ok 0.20", "lora  acme  \x1b[31mFAIL\x1b[0m 1/3  \x1b[32mok\x1b[0m 0.20"),
        ("lora  ✓ ok  0.5", "lora  \x1b[32m✓ ok\x1b[0m  0.5"),
        ("    ✗ fail: slower", "\x1b[31m    ✗ fail\x1b[0m: slower"),
        ("the run is ok", "the run is ok"),
        ("! busy: lora", "\x1b[33m! busy\x1b[0m: lora"),
    ],
)
def test_status_words_have_colours_on_a_terminal_only(
    line: str, coloured: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    print_lines([line])
    assert capsys.readouterr().out == f"{line}\n"
    for variables, expected in (({}, coloured), ({"NO_COLOR": "1"}, line)):
        monkeypatch.setattr(sys, "stdout", terminal := _Terminal())
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("TERM", "xterm")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        print_lines([line])
        assert terminal.getvalue() == f"{expected}\n"
