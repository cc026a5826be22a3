"""Test whether torch can use a GPU, in a separate process: `python -m harness.bench.gpu_probe FD LINE {}`."""

from __future__ import annotations

import sys

from harness.process.event_pipe import event_writer


def main(fd: int, line: int) -> None:
    """Emit the event `unusable` with the reason why torch cannot use a GPU.

    If torch can use one, the reason is an empty string.
    """
    with event_writer(fd, line) as emit:
        import torch

        why = "is built without CUDA" if torch.version.cuda is None else "cannot use it"
        emit(unusable="" if torch.cuda.is_available() else f"torch {torch.__version__} {why}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
