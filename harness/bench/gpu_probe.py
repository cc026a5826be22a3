"""Process that tests whether torch can use a GPU: `python -m harness.bench.gpu_probe FD LINE {}`.

FD and LINE are file descriptors. The process writes its answer to FD, and is killed when the other end of LINE closes.
"""

from __future__ import annotations

import sys

from harness.process.event_pipe import event_writer


def main(fd: int, line: int) -> None:
    """Write one event to `fd` with the keys `unusable` and `card`.

    `unusable` is the reason why torch cannot use a GPU, or empty. `card` is the name of the GPU, or empty.
    """
    with event_writer(fd, line) as emit:
        import torch

        why = "is built without CUDA" if torch.version.cuda is None else "cannot use it"
        usable = torch.cuda.is_available()
        card = torch.cuda.get_device_name() if usable else ""
        emit(unusable="" if usable else f"torch {torch.__version__} {why}", card=card)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
