"""The third party's door: a real package that is installed, tests made by the decorator, and plug-ins that misbehave."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from harness.conformance import checks
from harness.conformance.case_selection import FEW
from harness.conformance.drawing import sample
from harness.conformance.parity_suite import load, load_operation
from harness.errors import Exit, UsageError
from harness.testing import conformance, wrap_layers
from reference import lora
from support.once import once
from support.processes import PATIENCE_S
from support.repository import TESTS
from support.sandbox import COMMAND, ForkSandbox

pytestmark = pytest.mark.e2e

EXAMPLE = TESTS / "support" / "example_plugin"
DOOR_LINES = 15

SLEEP_S = f"600.{os.getpid()}"
"""Seconds that only the sleeps of these tests have: other sessions may test on this machine."""

# How a plug-in misbehaves -> the line that says so.
ON_IMPORT = {
    "raises": ("raise RuntimeError('no licence key')", "RuntimeError: no licence key"),
    "exits": ("import sys; sys.exit('bye')", "SystemExit: bye"),
    "garbage": ("implementations = [7]", "expected an Implementation, got 7"),
    "hangs": ("import time; time.sleep(600)", "importing it: no result for 10 s; killed"),
    "aborts": ("import os; os.abort()", "importing it: the process died of SIGABRT"),
}
WHEN_CALLED = {
    "garbage": ("return 7", "raised TypeError: attach returned 7, which is no Adapted"),
    "speaks": (
        "[os.write(fd, b'oops\\n') for fd in range(3, 256) if is_pipe(fd)]; return right(*given)",
        "wrote b'oops'",
    ),
    "sleeper": ("import time; time.sleep(600)", "no result for 10 s; killed"),
    "segfaults": ("os.kill(os.getpid(), signal.SIGSEGV)", "the process died of SIGSEGV"),
    "leaves": ("os._exit(0)", "the process ended with exit code 0 before it was done"),
    "quits": ("sys.exit(3)", "the process ended with exit code 3 before it was done"),
    "orphans": (
        f"subprocess.Popen(['sleep', '{SLEEP_S}'], start_new_session=True); return right(*given)",
        "left a process behind: sleep",
    ),
}
CALLED = """
import os, signal, subprocess, sys
from harness import implements

def right(model, config, generator):
    from reference.frozen import attach
    return attach(model, config, generator)

def is_pipe(fd):
    import fcntl
    try:
        return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_WRONLY
    except OSError:
        return False

@implements("frozen", name="{name}")
def implementations(*given):
    {body}
"""
PRESUMES = CALLED.format(name="presumes", body="return right(*given)") + "import torch; torch.set_num_threads(7)"
CHATTY = CALLED.format(name="chatty", body="os.write(1, b'{ no json'); print('hello'); return right(*given)")


def distribution(folder: Path, name: str, code: str) -> None:
    """Lay an installed distribution with one entry point into `folder`."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(
        f"[harness.implementations]\n{name} = {name}_plugin:implementations\n", encoding="utf-8"
    )
    (folder / f"{name}_plugin.py").write_text(code + "\n", encoding="utf-8")


def run(command: list[str], site: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=5 * PATIENCE_S
    )  # fmt: skip


def run_here(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command with the distributions in `folder / "plugin"`, which misbehave in forks of this process."""
    done = ForkSandbox(folder, {"NO_COLOR": "1"}).command(*arguments)
    return subprocess.CompletedProcess(arguments, done.code, done.out, done.err)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example plug-in, installed by pip."""
    source, target = tmp_path_factory.mktemp("source") / "plugin", tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLE, source)  # pip builds where the source is
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]  # which fetches the build backend
    done = subprocess.run([*command, "--target", str(target), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


# ---- a guest as one wishes for


@pytest.mark.nightly
def test_the_example_is_installed_checked_and_right(site: Path, tmp_path: Path) -> None:
    done = run([*COMMAND, "check", "acme", "--json"], site, tmp_path)
    assert done.returncode == Exit.PASS, done.stdout[-2000:] + done.stderr
    rows = json.loads(done.stdout)["checks"]
    passed = {(row["target"], row["result"]["check"].split("/")[1]) for row in rows if row["standing"] == "pass"}
    wide = {
        name
        for name, one in checks.every().items()
        if not one.is_tried(wide=False, sampled=False, typical=True, has_first=True)
    }
    # No case of its lora has dropout.
    usual = set(load("lora").checks) - {"dropout", "eval_mode"} - wide
    assert {check for target, check in passed if target == "lora"} >= usual
    usual = set(load_operation("nf4_dequantize").checks) - wide
    assert {check for target, check in passed if target == "nf4_dequantize"} == usual
    assert {row["dtype"] for row in rows if row["standing"] == "pass"} == {"float32", "bfloat16", "float16"}


def test_the_door_is_as_short_as_promised() -> None:
    text = (EXAMPLE / "acme_kernels" / "door.py").read_text(encoding="utf-8")
    assert all(0 < len(part.strip().splitlines()) < DOOR_LINES for part in text.split("\n\n\n")[1:])
    assert "harness" not in (EXAMPLE / "acme_kernels" / "nf4.py").read_text(encoding="utf-8").replace(
        "peft-harness", ""
    )


# ---- tests made by the decorator

TESTS = """
from acme_kernels.door import attach as acme
from acme_kernels.nf4 import decode
from harness.testing import conformance

@conformance("nf4_dequantize", dtypes=["float32"])
def right(packed, absmax, block, shape, dtype):
    return decode(packed, absmax, block, shape, dtype)

@conformance("nf4_dequantize", dtypes=["bfloat16"])
def swapped(packed, absmax, block, shape, dtype):
    return decode(packed >> 4 | packed << 4, absmax, block, shape, dtype)

@conformance("lora", dtypes=["float32"])
def attach(model, config, generator):
    return acme(model, config, generator)
"""


def pytest_(arguments: list[str], site: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA", *arguments]
    if not any(point.name == "peft-harness" for point in _pytest_points()):
        command += ["-p", "harness.pytest_plugin"]  # an editable install from before there was one
    return run(command, site, cwd)


def _pytest_points() -> list:
    from importlib.metadata import entry_points

    return list(entry_points(group="pytest11"))


def decorated(site: Path, cwd: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a session of pytest with these tests."""
    (cwd / "test_mine.py").write_text(TESTS, encoding="utf-8")
    return pytest_(["test_mine.py", *options], site, cwd)


@pytest.mark.nightly
def test_the_decorator_makes_a_test_of_every_case(site: Path, tmp_path: Path) -> None:
    plan, done = load_operation("nf4_dequantize"), decorated(site, tmp_path)
    cases = [*sample.fixed(plan, FEW, ["float32"])]
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.count("PASSED test_mine.py::right::") == len(cases)
    # A weight without elements, or with constants of 0, looks the same with swapped halves.
    assert done.stdout.count("FAILED test_mine.py::swapped::") >= len(plan.values)
    assert "PASSED test_mine.py::attach::" in done.stdout
    assert "FAILED test_mine.py::attach::" not in done.stdout
    assert "unsupported: no dropout" in done.stdout


def test_a_failure_says_all_that_one_needs(site: Path, tmp_path: Path) -> None:
    printed = decorated(site, tmp_path, "-k", "swapped and 160").stdout
    (line,) = [one for one in printed.splitlines() if one.startswith("FAIL swapped") and "[160, 96]" in one]
    for part in (
        "nf4_dequantize/outputs/bfloat16/call",
        "shape=[160, 96] block=64",
        "error ",
        "allowed ",
        "W [",
        "should be",
    ):
        assert part in line
    assert "Traceback" not in printed


def test_a_name_that_nobody_knows_is_said_at_once() -> None:
    with pytest.raises(UsageError, match="no Method or Operation is called 'nf4_dequantise'") as caught:
        conformance("nf4_dequantise")
    assert caught.value.hint == "did you mean `nf4_dequantize`?"


@pytest.mark.parametrize(
    ("dtypes", "said"),
    [
        (["fp32"], "dtypes has 'fp32'"),
        ("float32", "dtypes must be a list of words"),
        ([torch.float32], "dtypes has torch.float32.* did you mean `float32`"),
        ([], "dtypes is empty"),
    ],
)
def test_dtypes_that_would_make_no_tests_are_refused(dtypes, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        conformance("nf4_dequantize", dtypes=dtypes)(lambda **given: None)


def test_a_decorator_without_a_name_is_said() -> None:
    with pytest.raises(UsageError, match="has no name"):
        conformance(lambda **given: None)


def test_a_suite_without_a_case_in_the_dtype_is_said() -> None:
    with pytest.raises(UsageError, match="the parity suite of dynamic_quantize has no case in float64"):
        conformance("dynamic_quantize", dtypes=["float64"])(lambda **given: None)


def test_a_decorated_function_is_still_the_function() -> None:
    assert conformance("lora")(lambda *given: given)(1, 2, 3) == (1, 2, 3)


def test_the_door_and_the_plugin_import_no_torch() -> None:
    code = "import sys, harness.testing, harness.pytest_plugin; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# ---- layers without the rest of an Adapted


class Layer(torch.nn.Module):
    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.A = torch.nn.Parameter(torch.ones(2, base.in_features))
        self.B = torch.nn.Parameter(torch.ones(base.out_features, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.A.T @ self.B.T


def small() -> tuple[torch.nn.Module, lora.Config]:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU()), lora.Config(rank=2, targets=("0",))


def test_wrapped_layers_train_merge_and_go() -> None:
    model, config = small()
    base = model[0]
    adapted = wrap_layers(model, config, Layer, update=lambda layer: layer.B @ layer.A)
    assert set(adapted.tensors()) == {"0.A", "0.B"}
    assert {id(p) for p in adapted.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}
    assert type(model[0]) is Layer
    adapted.merge()
    assert type(model[0]) is torch.nn.Linear
    assert torch.equal(model[0].weight, base.weight + 2)
    adapted.unmerge()
    assert type(model[0]) is Layer
    adapted.detach()
    assert model[0] is base


def test_layers_that_do_not_say_their_update_cannot_merge() -> None:
    model, config = small()
    adapted = wrap_layers(model, config, Layer, names={"down": "A"})
    assert list(adapted.tensors()) == ["0.down"]
    assert not adapted.can_merge
    with pytest.raises(NotImplementedError):
        adapted.merge()


def test_a_layer_that_is_not_linear_is_unsupported_and_the_model_as_it_was() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4))
    with pytest.raises(NotImplementedError, match="layer 0 is not linear; its class is Embedding"):
        wrap_layers(model, lora.Config(targets=("0",)), Layer)
    assert type(model[0]) is torch.nn.Embedding
    assert model[0].weight.requires_grad


# ---- guests that misbehave


@pytest.fixture(scope="module")
def misbehaving(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], set[int]]:
    """All of them installed at once, checked at once on the smallest of Methods."""

    def make(folder: Path) -> dict[str, Any]:
        for name, (code, _) in ON_IMPORT.items():
            distribution(folder / "plugin", f"{name}-early".replace("-", "_"), code)
        for name, (body, _) in WHEN_CALLED.items():
            distribution(folder / "plugin", name, CALLED.format(name=name, body=body))
        distribution(folder / "plugin", "chatty", CHATTY)
        distribution(folder / "plugin", "presumes", PRESUMES)
        before = {process.pid for process in psutil.process_iter()}
        done = run_here(["check", "--method", "frozen", "--json", "--patience", "10", "--jobs", "2"], folder)
        left = {process.pid for process in psutil.process_iter() if _sleeps(process)} - before
        return {"done": vars(done), "left": [*left]}

    _, made = once(tmp_path_factory, "misbehaving", make)
    return subprocess.CompletedProcess(**made["done"]), set(made["left"])


def _sleeps(process: psutil.Process) -> bool:
    try:
        return process.cmdline() == ["sleep", SLEEP_S]
    except psutil.Error:
        return False


def test_one_that_misbehaves_is_a_finding_and_the_rest_goes_on(misbehaving) -> None:
    done, _ = misbehaving
    assert done.returncode == Exit.FAIL, done.stderr
    document = json.loads(done.stdout)
    standings = {row["standing"] for row in document["checks"] if row["implementation"] == "chatty"}
    assert "fail" not in standings
    assert "pass" in standings


@pytest.mark.parametrize("name", ON_IMPORT)
def test_what_happens_on_import_is_said(misbehaving, name: str) -> None:
    assert ON_IMPORT[name][1] in json.loads(misbehaving[0].stdout)["broken"][f"{name}_early"]


@pytest.mark.parametrize("name", WHEN_CALLED)
def test_what_happens_in_a_call_is_said(misbehaving, name: str) -> None:
    rows = [row for row in json.loads(misbehaving[0].stdout)["checks"] if row["implementation"] == name]
    assert any(WHEN_CALLED[name][1] in row["result"]["detail"] for row in rows if row["standing"] == "fail"), rows


def test_what_an_import_does_to_the_whole_process_is_said_and_undone(misbehaving) -> None:
    rows = [row for row in json.loads(misbehaving[0].stdout)["checks"] if row["implementation"] == "presumes"]
    (failed,) = [row for row in rows if row["standing"] == "fail"]
    assert failed["result"]["check"] == "frozen/settings/-/-"
    assert "importing it: the number of threads is 7, was " in failed["result"]["detail"]
    assert any(row["standing"] == "pass" for row in rows)


def test_nothing_is_left_running(misbehaving) -> None:
    assert misbehaving[1] == set()


def test_what_a_plugin_prints_is_not_among_the_results(misbehaving) -> None:
    assert "hello" not in misbehaving[0].stdout
    json.loads(misbehaving[0].stdout)


def test_who_declines_everything_could_not_be_tried(tmp_path: Path) -> None:
    body = "from harness import Unsupported; raise Unsupported('none at all')"
    distribution(tmp_path / "plugin", "declines", CALLED.format(name="declines", body=body))
    done = run_here(["check", "declines", "--method", "frozen", "--dtype", "float32"], tmp_path)
    assert done.returncode == Exit.INFRASTRUCTURE, done.stdout + done.stderr
    assert "requested, but not tried: declines" in done.stdout


# ---- guests that are wrong

MISTAKEN = """
import torch
from harness import implements

@implements("nf4_dequantize", name="mistaken"{how})
def implementations(*given, **named):
    return 7
"""
# What @implements says -> what is said of the plug-in, and of no other.
MISTAKES = {
    "wordless": (", dtypes=[torch.float32]", "dtypes has torch.float32"),
    "nameless": (", name=None", "name must be a word"),
    "strange": (", dtypes=['fp32']", "dtypes has 'fp32'"),
    "kindly": (", kind='method'", "nf4_dequantize is of kind 'operation'; leave `kind` out"),
}


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """All of them at once, one that takes our name and crashes, one that forgets `kind`, and one whose need is broken."""
    folder = tmp_path_factory.mktemp("mistaken")
    site = folder / "plugin"
    for name, (how, _) in MISTAKES.items():
        code = MISTAKEN.format(how=how).replace(*(('name="mistaken", ', "") if "name=" in how else ("", "")))
        distribution(site, name, code)
    distribution(site, "misspelt", MISTAKEN.format(how="").replace("nf4_dequantize", "nf4_dequantise"))
    distribution(site, "forgets", MISTAKEN.format(how="").replace("mistaken", "forgets"))
    distribution(site, "needs", MISTAKEN.format(how=", requires=['torn']").replace("mistaken", "needs"))
    (site / "torn.py").write_text("raise OSError('no such symbol')", encoding="utf-8")
    distribution(site, "thief", "import os; os._exit(3)")
    points = site / "thief-1.0.dist-info" / "entry_points.txt"
    points.write_text(points.read_text(encoding="utf-8").replace("thief =", "reference ="), encoding="utf-8")
    only = ["--op", "nf4_dequantize", "--dtype", "float32", "--check", "outputs"]
    return run_here(["check", *only, "--json", "--jobs", "2"], folder)


@pytest.mark.parametrize("name", [*MISTAKES, "misspelt"])
def test_a_mistake_is_blamed_on_the_plugin_that_made_it(mistaken, name: str) -> None:
    broken = json.loads(mistaken.stdout)["broken"]
    assert {**{n: w for n, (_, w) in MISTAKES.items()}, "misspelt": "did you mean `nf4_dequantize`?"}[name] in broken[
        name
    ]
    assert set(broken) == {*MISTAKES, "misspelt", "reference of thief"}


def test_a_guest_with_our_name_does_not_take_ours_down(mistaken) -> None:
    document = json.loads(mistaken.stdout)
    assert "the process ended with exit code 3" in document["broken"]["reference of thief"]
    ours = [row["standing"] for row in document["checks"] if row["implementation"] == "reference"]
    assert "pass" in ours
    assert "fail" not in ours


def test_the_target_says_the_kind(mistaken) -> None:
    rows = [row for row in json.loads(mistaken.stdout)["checks"] if row["implementation"] == "forgets"]
    assert {row["kind"] for row in rows} == {"operation"}
    assert any("got int" in row["result"]["detail"] for row in rows)


@pytest.mark.nightly
def test_what_is_installed_and_broken_is_a_failure(mistaken) -> None:
    (row,) = [row for row in json.loads(mistaken.stdout)["checks"] if row["implementation"] == "needs"]
    assert row["standing"] == "fail"
    assert row["case"] == "importing torn"
    assert "raised OSError: no such symbol" in row["result"]["detail"]
