"""The environment of a Record: how many cores there really are, and what steers the threads on them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest

from harness.records import environment


def _cgroup(folder: Path, own: str, limits: dict[str, str]) -> tuple[Path, Path]:
    """Write a cgroup tree (path below the root: its cpu.max) and the file that names this process's own group."""
    for path, limit in limits.items():
        (folder / "fs" / path).mkdir(parents=True, exist_ok=True)
        (folder / "fs" / path / "cpu.max").write_text(f"{limit}\n")
    (folder / "self").write_text(f"1:cpu:/elsewhere\n0::{own}\n")
    return folder / "fs", folder / "self"


@pytest.mark.parametrize(
    ("own", "limits", "cpus"),
    [
        ("/", {"": "150000 100000"}, 1.5),
        ("/", {"": "max 100000"}, None),
        ("/", {}, None),
        ("/job/step", {"job/step": "400000 100000"}, 4.0),
        ("/job/step", {"job": "200000 100000", "job/step": "max 100000"}, 2.0),
        ("/job/step", {"job": "200000 100000", "job/step": "800000 100000"}, 2.0),
        ("/job/step", {"": "100000 100000", "job/step": "800000 100000"}, 1.0),
        ("/job/step", {"other": "100000 100000"}, None),
    ],
)
def test_a_quota_holds_for_all_below_it(tmp_path: Path, own: str, limits: dict[str, str], cpus: float | None) -> None:
    assert environment.cgroup_cpus(*_cgroup(tmp_path, own, limits)) == cpus


@pytest.mark.parametrize(
    ("quotas", "cpus"),
    [
        ({"job/step": -1}, None),
        ({"job/step": 250000}, 2.5),
        ({"job/step": 400000, "job": 200000}, 2.0),
        ({"": 100000, "job": -1}, 1.0),  # as in a container, whose own group is the root that it sees
    ],
)
def test_a_quota_of_the_older_cgroups(tmp_path: Path, quotas: dict[str, int], cpus: float | None) -> None:
    for path, quota in quotas.items():
        (folder := tmp_path / "fs" / "cpu" / path).mkdir(parents=True, exist_ok=True)
        (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "self").write_text("4:memory:/elsewhere\n3:cpu,cpuacct:/job/step\n0::/\n")
    assert environment.cgroup_cpus(tmp_path / "fs", tmp_path / "self") == cpus


def test_no_cgroup_is_no_limit(tmp_path: Path) -> None:
    assert environment.cgroup_cpus(tmp_path, tmp_path / "nothing") is None
    (tmp_path / "old").write_text("1:cpu:/job\n")
    assert environment.cgroup_cpus(tmp_path, tmp_path / "old") is None


@pytest.mark.parametrize(
    ("affinity", "physical", "quota", "cores"),
    [(8, 4, None, 4), (2, 4, None, 2), (8, 4, 3.9, 3), (8, 4, 0.5, 1), (8, None, None, 8), (8, 4, 64.0, 4)],
)
def test_threads_are_as_many_as_may_run(
    monkeypatch: pytest.MonkeyPatch, affinity: int, physical: int | None, quota: float | None, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: physical)
    monkeypatch.setattr(environment, "cgroup_cpus", lambda: quota)
    assert environment.physical_cores() == cores


def test_what_steers_threads_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_")):
            monkeypatch.delenv(name)
    assert environment.thread_variables() == {}
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setenv("COMP_WORDS", "no")
    assert environment.thread_variables() == {"OMP_WAIT_POLICY": "passive"}


@pytest.mark.parametrize(("asked", "given"), [("1", 1), ("4096", None), ("", None), ("0", None), ("2,1", None)])
def test_threads_are_those_of_the_cores_or_fewer_if_asked(
    monkeypatch: pytest.MonkeyPatch, asked: str, given: int | None
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert environment.threads() == (given or environment.physical_cores())


@pytest.mark.parametrize(("visible", "seen"), [(None, 1), ("0", 1), ("GPU-aa", 1), ("", 0), ("-1", 0), ("-1,0", 0)])
def test_cards_that_are_hidden_are_none(
    visible: str | None, seen: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tool := tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU-aa, A card, 1.2, 80 MiB'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(environment, "_listed", environment._listed.__wrapped__)
    assert len(environment.gpus()) == seen


def test_a_driver_that_does_not_answer_shows_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tool := tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU-aa, A card, 1.2, 80 MiB'\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(environment, "_listed", environment._listed.__wrapped__)
    assert environment.gpus() == ()
    assert "exit status 9" in environment.gpu_error()


@pytest.mark.skipif(shutil.which("git") is None, reason="wants git")
@pytest.mark.parametrize(
    ("written", "dirty"), [("results/canaries.jsonl", False), ("results/history/n.jsonl", False), ("kernel.py", True)]
)
def test_what_runs_write_makes_no_checkout_dirty(
    written: str, dirty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    monkeypatch.setattr(environment.resources, "checkout", lambda: tmp_path)
    (tmp_path / written).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / written).write_text("{}\n")
    environment._git.cache_clear()
    try:
        assert environment._git()[1] is dirty
    finally:
        environment._git.cache_clear()


def test_a_git_that_does_not_answer_is_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\nexec sleep 60\n", encoding="utf-8")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(environment, "_GIT_S", 0.1)
    monkeypatch.setattr(environment.resources, "checkout", lambda: tmp_path)
    environment._git.cache_clear()
    try:
        described = environment.describe()
    finally:
        environment._git.cache_clear()
    assert (described.git_sha, described.git_dirty) == ("", None)


@pytest.mark.parametrize("library", ["kernels", "flash-attn"])
def test_an_installed_library_that_replaces_code_of_another_changes_the_id(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = environment.describe()
    folder = tmp_path / f"{library.replace('-', '_')}-99.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {library}\nVersion: 99.0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    after = environment.describe()
    assert after.software == before.software | {library: "99.0"}
    assert after.id != before.id
