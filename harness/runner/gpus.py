"""The NVIDIA GPUs of this machine, and the processes that use them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.errors import HarnessError
from harness.process import nvidia_smi

_IDLE_MIB = 512
"""Memory that the driver itself may hold on an idle card."""


@dataclass(frozen=True)
class GpuDevice:
    """A card."""

    index: int
    uuid: str
    used_mib: int
    processes: tuple[str, ...] = ()
    """Processes of any user on it, as `process 12 (python, 300 MiB)`."""

    @property
    def busy(self) -> str:
        """A sentence on its users; empty if it is idle. A container hides processes of others, but not their memory."""
        if self.processes:
            return f"GPU {self.index} ({self.uuid}) is in use by {', '.join(self.processes)}"
        if self.used_mib > _IDLE_MIB:
            return f"GPU {self.index} ({self.uuid}) has {self.used_mib} MiB in use, by no process that can be seen"
        return ""


class GpuProbe:
    """A call of `look` in a thread, so that a slow driver does not block the runner."""

    def __init__(self, look: Callable[[], list[GpuDevice]]) -> None:
        self._look, self._over = look, threading.Event()
        self._result: list[GpuDevice] | HarnessError = HarnessError("the GPUs could not be probed")
        # A daemon: the end of a run does not wait for it.
        threading.Thread(target=self._work, name="probe the GPUs", daemon=True).start()

    def _work(self) -> None:
        try:
            self._result = self._look()
        except HarnessError as error:
            self._result = error
        finally:
            self._over.set()

    def over(self, within: float = 0.0) -> bool:
        """Wait up to `within` seconds, and return whether there is an answer."""
        return self._over.wait(within)

    def result(self) -> list[GpuDevice]:
        """Return the GPUs, once it is over; raises HarnessError if the driver did not answer."""
        if isinstance(self._result, HarnessError):
            raise self._result
        return self._result


def look() -> list[GpuDevice]:
    """Return the GPUs that this process may use, in the order of CUDA_VISIBLE_DEVICES where that is set.

    A part of a card (MIG) is not listed: the list is empty then, and the batch system has chosen one.
    """
    processes: dict[str, list[str]] = {}
    for uuid, pid, name, used in nvidia_smi.rows("compute-apps=gpu_uuid,pid,name,used_memory"):
        processes.setdefault(uuid, []).append(f"process {pid} ({name.rsplit('/', 1)[-1]}, {used} MiB)")
    found = [
        GpuDevice(int(index), uuid, int(used) if used.isdecimal() else 0, tuple(processes.get(uuid, ())))
        for index, uuid, used in nvidia_smi.rows("gpu=index,uuid,memory.used")
    ]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if visible is None else _chosen(found, visible)


def _chosen(cards: Sequence[GpuDevice], visible: str) -> list[GpuDevice]:
    chosen = []
    for word in filter(None, (word.strip() for word in visible.split(","))):
        chosen += [
            gpu for gpu in cards if word == str(gpu.index) or (word.startswith("GPU-") and gpu.uuid.startswith(word))
        ]
    return chosen
