"""The compiled C++ kernels: compilation for this CPU on first use, and loading.

Compilation takes 1 to 3 s, once per machine: the library stays in the cache folder. Other threads wait meanwhile. The
kernels run on Linux only. Everywhere else, without a C++ compiler, and with PEFT_HARNESS_COMPILE=0 in the environment,
torch operations compute the same results more slowly.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from harness.cache_folder import root as cache_root

_SOURCE = Path(__file__).with_name("nf4.cpp")
# Fused multiply-adds would round once where torch rounds twice.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
_PATIENCE = 120
"""Seconds after which compilation is given up."""
_COMPILING = Lock()
"""Lock that is held while compiling, so that two threads do not compile at once."""
_loaded: list[ctypes.CDLL | None] = []
"""The library, or None if it could not be loaded. Empty before the first attempt."""


def library_for(*tensors: Tensor) -> ctypes.CDLL | None:
    """Return the library if its kernels can take these tensors, otherwise None.

    They can take contiguous tensors of class Tensor or Parameter on a CPU, while no torch mode or transform observes
    operations. None is also the result where the library is switched off or does not compile.
    """
    if sys.platform != "linux" or os.environ.get("PEFT_HARNESS_COMPILE") == "0":
        return None
    if torch.compiler.is_compiling() or _observed() or not all(map(_plain, tensors)):
        return None
    if not _loaded:
        with _COMPILING:
            if not _loaded:
                _loaded.append(_load())
    return _loaded[0]


def _renew_lock() -> None:
    """Give a forked process a lock of its own, since a thread that holds the old one exists only in the parent."""
    global _COMPILING
    _COMPILING = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def _plain(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" and tensor.is_contiguous()
    return plain and not tensor.is_neg() and not tensor._is_zerotensor()  # these do not hold their values in memory


def _observed() -> bool:
    """Return whether a torch mode or transform observes operations. It would not see what a C++ kernel does.

    The result is True if this version of torch gives no access to its modes.
    """
    try:
        return (
            torch._C._len_torch_dispatch_stack() > 0
            or torch._C._functorch.peek_interpreter_stack() is not None
            or torch._C._is_tracing()
        )
    except AttributeError:
        return True


def _load() -> ctypes.CDLL | None:
    """Return the library, compiled first if the cache folder does not hold it.

    If that fails, warn and return None.
    """
    try:
        path = _path()
        if path.is_file():
            with suppress(OSError):  # the file is damaged
                return _open(path)
            path.unlink()
        _compile(path)
        return _open(path)
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        warnings.warn(
            f"{__name__}: the NF4 kernels for the CPU could not be compiled and loaded; they run as torch operations, "
            f"several times slower: {str(detail).strip()[:300]}. hint: install a C++ compiler with OpenMP (g++), let "
            "PEFT_HARNESS_CACHE name a folder that you can write and run programs in, or set PEFT_HARNESS_COMPILE=0",
            RuntimeWarning,
            stacklevel=4,
        )
        return None


def _open(path: Path) -> ctypes.CDLL:
    """Load the library. Raises OSError if it is damaged, or if another user could have changed it."""
    if path.stat().st_uid not in (0, os.getuid()):
        raise PermissionError(f"{path} belongs to another user")
    return ctypes.CDLL(str(path))


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def _path() -> Path:
    """Return the path of the library. It changes with the source, the flags, the compiler, the CPU and the user."""
    compiler = shutil.which(_compiler()[0])
    if compiler is None:
        raise FileNotFoundError(f"{_compiler()[0]} is not installed")
    status = Path(compiler).stat()
    facts = [*_FLAGS, *_compiler(), compiler, status.st_size, status.st_mtime_ns, os.getuid(), _cpu()]
    key = hashlib.sha256(_SOURCE.read_bytes() + repr(facts).encode()).hexdigest()[:16]
    return cache_root() / "kernels" / f"nf4-{key}.so"


def _cpu() -> list[str]:
    """Return the lines of /proc/cpuinfo that say which instructions the first CPU has."""
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        first = file.read(1 << 14).split("\n\n")[0]
    return [platform.machine(), *(line for line in first.splitlines() if line.startswith(names))]


def _compile(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, made = tempfile.mkstemp(dir=path.parent, suffix=".so")
    os.close(handle)
    try:
        command = [*_compiler(), *_FLAGS, "-o", made, str(_SOURCE)]
        subprocess.run(
            command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=_PATIENCE, encoding="utf-8",
            errors="replace",
        )  # fmt: skip
        with Path(made).open("rb") as file:
            os.fsync(file.fileno())  # otherwise a power failure could leave half of the file under the final name
        Path(made).replace(path)
    finally:
        Path(made).unlink(missing_ok=True)
