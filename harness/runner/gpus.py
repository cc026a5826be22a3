"""The NVIDIA GPUs of this machine, and the processes that use them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from harness.errors import HarnessError
from harness.process import nvidia_smi

_IDLE_MIB = 512
"""Maximum memory in use on an idle GPU, in MiB. The driver itself uses some."""


@dataclass(frozen=True)
class GpuDevice:
    """A GPU of this machine."""

    index: int
    uuid: str
    used_mib: int
    processes: tuple[str, ...] = ()
    """Descriptions of the processes of all users on this GPU, e.g. `process 12 (python, 300 MiB)`."""

    @property
    def busy(self) -> str:
        """A sentence that says who uses the GPU. It is empty if the GPU is idle.

        In a container, other processes may be invisible. A GPU therefore also counts as busy if much of its memory is
        in use.
        """
        if self.processes:
            return f"GPU {self.index} ({self.uuid}) is in use by {', '.join(self.processes)}"
        if self.used_mib > _IDLE_MIB:
            return f"GPU {self.index} ({self.uuid}) has {self.used_mib} MiB in use, by no process that can be seen"
        return ""


def probe(list_gpus: Callable[[], list[GpuDevice]]) -> Future[list[GpuDevice]]:
    """Call `list_gpus` in a thread, and return a Future of its result. A slow driver therefore does not block the runner.

    If `list_gpus` raises HarnessError, the method `result()` of the Future raises it.
    """
    found: Future[list[GpuDevice]] = Future()

    def work() -> None:
        try:
            found.set_result(list_gpus())
        except HarnessError as error:
            found.set_exception(error)
        finally:
            if not found.done():
                found.set_exception(HarnessError("the GPUs could not be probed"))

    # The thread is a daemon, so that the end of a run does not wait for it. It would wait for threads of concurrent.futures.
    threading.Thread(target=work, name="probe the GPUs", daemon=True).start()
    return found


def list_gpus() -> list[GpuDevice]:
    """Return the GPUs that this process may use. If CUDA_VISIBLE_DEVICES is set, its order is kept.

    If CUDA_VISIBLE_DEVICES names a part of a GPU (MIG), return an empty list.
    """
    processes: dict[str, list[str]] = {}
    for uuid, pid, used, name in nvidia_smi.rows("compute-apps=gpu_uuid,pid,used_memory,name"):
        processes.setdefault(uuid, []).append(f"process {pid} ({name.rsplit('/', 1)[-1]}, {used} MiB)")
    found = [
        GpuDevice(int(index), uuid, int(used) if used.isdecimal() else 0, tuple(processes.get(uuid, ())))
        for index, uuid, used in nvidia_smi.rows("gpu=index,uuid,memory.used")
    ]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if visible is None else _chosen(found, visible)


def _chosen(cards: Sequence[GpuDevice], visible: str) -> list[GpuDevice]:
    def names(word: str, card: GpuDevice) -> bool:
        return word == str(card.index) or (word.startswith("GPU-") and card.uuid.startswith(word))

    return [card for word in visible.split(",") for card in cards if names(word.strip(), card)]
