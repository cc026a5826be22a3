"""The NVIDIA GPUs of this machine, and whether somebody else is at work on one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.errors import HarnessError
from harness.process import nvidia_smi

# What the driver itself may hold on an idle card.
_IDLE_MIB = 512


@dataclass(frozen=True)
class GpuDevice:
    """A card: its number, its UUID, and what runs on it (`process 12 (python, 300 MiB)`), of whomever."""

    index: int
    uuid: str
    used_mib: int
    processes: tuple[str, ...] = ()

    @property
    def busy(self) -> str:
        """Say who uses it; empty if nobody does. In a container processes of others may not be seen, their memory is."""
        if self.processes:
            return f"GPU {self.index} ({self.uuid}) is in use by {', '.join(self.processes)}"
        if self.used_mib > _IDLE_MIB:
            return f"GPU {self.index} ({self.uuid}) has {self.used_mib} MiB in use, by no process that can be seen"
        return ""


class GpuProbe:
    """A `look` in a thread of its own: a driver that takes its time holds nobody up."""

    def __init__(self, look: Callable[[], list[GpuDevice]]) -> None:
        self._look, self._over = look, threading.Event()
        self._seen: list[GpuDevice] | HarnessError = HarnessError("the GPUs could not be looked at")
        # A daemon: a run that is ended does not wait for it.
        threading.Thread(target=self._work, name="look at the GPUs", daemon=True).start()

    def _work(self) -> None:
        try:
            self._seen = self._look()
        except HarnessError as error:
            self._seen = error
        finally:
            self._over.set()

    def over(self, within: float = 0.0) -> bool:
        """Return whether there is an answer, after waiting so many seconds for it at most."""
        return self._over.wait(within)

    def seen(self) -> list[GpuDevice]:
        """Return what was seen, once it is over; raises HarnessError where the driver did not answer."""
        if isinstance(self._seen, HarnessError):
            raise self._seen
        return self._seen


def look() -> list[GpuDevice]:
    """Return the GPUs that this process may use, in the order of CUDA_VISIBLE_DEVICES where that is set.

    A part of a card (MIG) is not seen: then the list is empty and the place that started this process has chosen.
    """
    processes: dict[str, list[str]] = {}
    for uuid, pid, name, used in nvidia_smi.rows("compute-apps=gpu_uuid,pid,name,used_memory"):
        processes.setdefault(uuid, []).append(f"process {pid} ({name.rsplit('/', 1)[-1]}, {used} MiB)")
    there = [
        GpuDevice(int(index), uuid, int(used) if used.isdecimal() else 0, tuple(processes.get(uuid, ())))
        for index, uuid, used in nvidia_smi.rows("gpu=index,uuid,memory.used")
    ]
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    return there if asked is None else _chosen(there, asked)


def _chosen(there: Sequence[GpuDevice], asked: str) -> list[GpuDevice]:
    found = []
    for word in filter(None, (word.strip() for word in asked.split(","))):
        found += [
            gpu for gpu in there if word == str(gpu.index) or (word.startswith("GPU-") and gpu.uuid.startswith(word))
        ]
    return found
