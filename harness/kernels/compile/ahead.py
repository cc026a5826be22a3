"""Judge our Triton kernels by their machine code, compiled for GPUs that this machine need not have.

    python -m harness.kernels.compile.ahead --arch 80 --arch 90 --arch 100 [--module nf4] [--json] [--write]

A module below `harness.kernels.triton` may define a list SPECIMENS. Each specimen is one instance of a kernel. A
specimen fails

- if it spills registers, or needs more shared memory than the architecture has;
- if `registers.json` has no entry for this specimen, architecture and minor version of Triton, or allows fewer registers;
- if a streaming kernel does not load and store 128 bits at a time, or a matrix product uses no matrix instructions;
- if it multiplies float32 as TF32, or fuses multiplications and additions that must round separately.

`--write` enters the measured numbers of registers in `registers.json`. The command prints one line per specimen and
architecture. It exits with 1 if a specimen fails, and with 2 if there is nothing to judge.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.kernels.compile.machine_code import MachineCode
    from harness.kernels.compile.specimen import Specimen

KERNELS = "harness.kernels.triton"
"""Package that is searched for modules with kernels, including its subpackages."""
REGISTERS = Path(__file__).with_name("registers.json")
"""File with the allowed numbers of registers per thread. `Table` describes its content."""
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Architecture -> bytes of shared memory available to one program (CUDA C++ programming guide, compute capabilities)."""
Table = dict[str, dict[str, dict[str, int]]]
"""Minor version of Triton (`3.6`) -> architecture (`sm_90`) -> name of a `Specimen` -> allowed registers per thread."""


@dataclass(frozen=True)
class KernelVerdict:
    """Result of judging one specimen (an instance of a kernel) for one architecture."""

    name: str
    architecture: int
    found: MachineCode | None
    """Counts of instructions, registers and memory in the machine code. None if the kernel did not compile."""
    faults: tuple[str, ...]
    """Reasons why the specimen (an instance of a kernel) fails. Empty if it passes."""

    def line(self) -> str:
        """Return the line that the command prints for this verdict."""
        status = f"FAIL: {'; '.join(self.faults)}" if self.faults else "ok"
        code = self.found
        if code is None:
            return f"{self.name:<44} sm_{self.architecture}  {status}"
        matrix = "".join(f", {count} {name}" for name, count in code.matrix.items())
        return (
            f"{self.name:<44} sm_{self.architecture}  {code.registers:>3} registers, {code.shared:>6} B shared, "
            f"{code.instructions:>5} instructions, {code.wide_loads} wide loads, {code.wide_stores} wide stores{matrix}"
            f"  {status}"
        )


def modules() -> dict[str, str]:
    """Return a dict: short name of each module that may have kernels (a value of `--module`) -> its dotted path."""
    package = importlib.import_module(KERNELS)
    found = pkgutil.walk_packages(package.__path__, f"{KERNELS}.")
    return {one.name.rpartition(".")[2]: one.name for one in found if not one.ispkg}


def faults(specimen: Specimen, found: MachineCode, architecture: int, limit: int | None) -> Iterator[str]:
    """Yield a text for each reason why a compiled specimen (an instance of a kernel) fails.

    found: counts in the compiled code. limit: allowed registers per thread. None if the table has no entry for this
    specimen.
    """
    if found.stack:
        yield f"{found.stack} B of stack: registers are spilled"
    if found.shared > SHARED[architecture]:
        yield f"{found.shared} B of shared memory, sm_{architecture} has {SHARED[architecture]} per program"
    if limit is None:
        yield f"{REGISTERS.name} has no entry; review the number, then enter it with --write"
    elif found.registers > limit:
        yield f"{found.registers} registers, {REGISTERS.name} allows {limit}"
    if specimen.kind == "streaming":
        if not found.wide_loads:
            yield "no load of 128 bits"
        if not found.wide_stores:
            yield "no store of 128 bits"
        if found.narrow_loads > specimen.narrow_loads:
            yield f"{found.narrow_loads} loads of one byte, at most {specimen.narrow_loads} allowed"
    if specimen.kind == "gemm" and not found.matrix:
        yield "no matrix instruction"
    if found.matrix and not any(kind in ("*bf16", "*fp16") for kind in specimen.signature.values()):
        yield "matrix instructions without 16-bit operands: float32 is multiplied as TF32"
    if found.fused_multiply_adds and specimen.separate_roundings:
        yield f"{found.fused_multiply_adds} fused multiply-adds in a kernel that must round every product"


def judge(module: str, architecture: int, limits: dict[str, int]) -> list[KernelVerdict]:
    """Compile and judge the specimens (instances of kernels) of the module at this dotted path.

    Errors of import and compilation become faults. limits: name of a specimen -> allowed registers per thread.
    """
    from harness.kernels.compile.machine_code import machine_code

    try:
        specimens = getattr(importlib.import_module(module), "SPECIMENS", [])
    except Exception as error:  # noqa: BLE001 - a broken module must not hide the verdicts of others
        return [KernelVerdict(module, architecture, None, (f"does not import: {_short(error)}",))]
    verdicts = []
    for specimen in specimens:
        if architecture < specimen.oldest:
            continue
        try:
            found = machine_code(specimen, architecture)
        except Exception as error:  # noqa: BLE001 - Triton raises many types
            verdicts.append(KernelVerdict(specimen.name, architecture, None, (f"does not compile: {_short(error)}",)))
        else:
            problems = tuple(faults(specimen, found, architecture, limits.get(specimen.name)))
            verdicts.append(KernelVerdict(specimen.name, architecture, found, problems))
    return verdicts


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' | '.join(lines[-3:])[:300]}"


def judge_all(chosen: list[str], architectures: list[int], table: Table, version: str) -> list[KernelVerdict]:
    """Judge the specimens (instances of kernels) of the chosen modules for all architectures, in two processes.

    chosen: dotted paths of the modules. version: minor version of Triton.
    """
    limits = {architecture: table.get(version, {}).get(f"sm_{architecture}", {}) for architecture in architectures}
    # Compilers and threads of torch do not survive a fork, hence spawn.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, initializer=_end_with, initargs=(os.getpid(),)) as pool:
        jobs = [pool.submit(judge, module, one, limits[one]) for module in chosen for one in architectures]
        verdicts = [verdict for job in jobs for verdict in job.result()]
    counts = Counter((one.name, one.architecture) for one in verdicts)
    return [
        replace(one, faults=(*one.faults, "another specimen has this name"))
        if counts[one.name, one.architecture] > 1
        else one
        for one in verdicts
    ]


def _end_with(parent: int) -> None:
    """End this process soon after the process with the id `parent` has ended or was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def enter(table: Table, verdicts: list[KernelVerdict], version: str, architecture: int, *, replace_all: bool) -> None:
    """Write the registers per thread of the compiled kernels into `table`, for one architecture and version of Triton.

    replace_all: True to drop the entries of kernels that were not compiled now.
    """
    measured = {one.name: one.found.registers for one in verdicts if one.found and one.architecture == architecture}
    row = table.setdefault(version, {})
    before = {} if replace_all else row.get(f"sm_{architecture}", {})
    row[f"sm_{architecture}"] = {**before, **measured}


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.ahead", description=summary)
    capabilities = sorted(SHARED)
    parser.add_argument(
        "--arch", type=int, action="append", required=True, choices=capabilities, help="compute capability, such as 90"
    )
    modules_help = "module below harness/kernels/triton, such as nf4 [default: all]"
    parser.add_argument("--module", action="append", help=modules_help)
    parser.add_argument("--json", action="store_true", help="print the verdicts as JSON")
    parser.add_argument("--write", action="store_true", help=f"enter the measured registers in {REGISTERS.name}")
    options = parser.parse_args(arguments)
    known = modules()
    if unknown := set(options.module or ()) - set(known):
        parser.error(f"unknown module {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 disables compilation; unset it")

    from harness.kernels.compile.machine_code import version

    table: Table = json.loads(REGISTERS.read_text()) if REGISTERS.exists() else {}
    chosen = [known[name] for name in options.module or known]
    verdicts = judge_all(chosen, options.arch, table, version())
    if options.write:
        for architecture in options.arch:
            enter(table, verdicts, version(), architecture, replace_all=not options.module)
        REGISTERS.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        verdicts = judge_all(chosen, options.arch, table, version())
    if options.json:
        print(json.dumps({"triton": version(), "verdicts": [asdict(verdict) for verdict in verdicts]}, indent=1))
    else:
        for verdict in verdicts:
            print(verdict.line())
    if not verdicts:
        print("none of these modules has SPECIMENS", file=sys.stderr)
        return 2
    return int(any(verdict.faults for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
