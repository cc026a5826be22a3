"""Worker that measures nothing, for tests of executors: `stub_worker.py RECORDS ACTS EVENTS LIFELINE < WORK.json`.

RECORDS/<seed>.json holds a Record for each seed. The worker writes it as the Record of its Cell; the notes hold the
number of cores and the GPU that the worker was given. ACTS maps seeds to something else to do: `hang` (and write the
process id into the run's folder), `die` (by SIGKILL), `orphan` (kill the parent, then hang), or `slow` (wait 0.05 s,
then write the Record).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from harness.process.lifeline import die_with_parent


def main() -> None:
    records, acts, events, watched = sys.argv[1:]
    work = json.load(sys.stdin)
    die_with_parent(int(watched), int(events))
    seed, folder = str(work["cell"]["seed"]), Path(work["folder"])
    os.write(int(events), b'{"event": "phase", "name": "pretending"}\n')
    with (folder / "started").open("a") as started:
        started.write(f"{seed}\n")
    act = json.loads(acts).get(seed)
    if act in ("hang", "orphan"):
        (folder / "pid.tmp").write_text(str(os.getpid()))
        (folder / "pid.tmp").rename(folder / "pid")
        if act == "orphan":
            os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)
    if act == "slow":
        time.sleep(0.05)
    if act == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    record = json.loads((Path(records) / f"{seed}.json").read_text(encoding="utf-8"))
    given = [os.environ.get(name, "") for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")]
    record |= {"run": work["run"], "attempt": work["attempt"], "notes": given}
    record["assets"] = [work[what]["use"] for what in ("model", "data", "task")]
    name = f"{record['cell_id']}.{work['attempt']}.json"
    temporary = folder / "cells" / f".{name}.tmp"
    temporary.write_text(json.dumps(record), encoding="utf-8")
    temporary.rename(folder / "cells" / name)


if __name__ == "__main__":
    main()
