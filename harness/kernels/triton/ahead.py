"""Judges all our Triton kernels by their machine code, compiled ahead of time for GPUs that need not be there.

    python -m harness.kernels.triton.ahead --arch 80 --arch 90 --arch 100 [--module nf4] [--json] [--write]

Every module of this package may have a list SPECIMENS. No kernel may spill registers, nor need more of them than
`registers.json` has for this specimen, architecture and minor version of Triton (`--write` enters what was found);
streaming kernels must move 128 bits at a time, and products use the matrix instructions; a program must find the shared
memory it wants. One line for each; the exit code is 1 if any fails, and 2 if there is nothing to judge.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.kernels.triton.machine_code import MachineCode
    from harness.kernels.triton.specimen import Specimen

REGISTERS = Path(__file__).with_name("registers.json")
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Architecture -> bytes of shared memory that one program can have (CUDA C++ programming guide, compute capabilities)."""
Table = dict[str, dict[str, dict[str, int]]]
"""Version of Triton -> architecture -> specimen -> registers."""


@dataclass(frozen=True)
class KernelVerdict:
    """What became of one specimen. found: None if it did not compile. faults: empty if it passes."""

    name: str
    architecture: int
    found: MachineCode | None
    faults: tuple[str, ...]

    def line(self) -> str:
        """Return it in words."""
        standing = f"FAIL: {'; '.join(self.faults)}" if self.faults else "ok"
        it = self.found
        if it is None:
            return f"{self.name:<44} sm_{self.architecture}  {standing}"
        matrix = "".join(f", {count} {name}" for name, count in it.matrix.items())
        return (
            f"{self.name:<44} sm_{self.architecture}  {it.registers:>3} registers, {it.shared:>6} B shared, "
            f"{it.instructions:>5} instructions, {it.wide_loads} wide loads, {it.wide_stores} wide stores{matrix}"
            f"  {standing}"
        )


def modules() -> list[str]:
    """Return the modules of this package but this one."""
    return [one.name for one in pkgutil.iter_modules([str(Path(__file__).parent)]) if one.name != "ahead"]


def faults(specimen: Specimen, found: MachineCode, architecture: int, limit: int | None) -> Iterator[str]:
    """Yield what is wrong. limit: the registers that the table allows."""
    if found.stack:
        yield f"{found.stack} B of stack: registers are spilled"
    if found.shared > SHARED[architecture]:
        yield f"{found.shared} B of shared memory, sm_{architecture} has {SHARED[architecture]} for a program"
    if limit is None:
        yield f"{REGISTERS.name} does not have it; once you have looked at it, --write enters it"
    elif found.registers > limit:
        yield f"{found.registers} registers, {REGISTERS.name} allows {limit}"
    if specimen.kind == "streaming":
        if not found.wide_loads:
            yield "no load of 128 bits"
        if not found.wide_stores:
            yield "no store of 128 bits"
        if found.narrow_loads > specimen.narrow_loads:
            yield f"{found.narrow_loads} loads of one byte, where {specimen.narrow_loads} are expected"
    if specimen.kind == "gemm" and not found.matrix:
        yield "no matrix instruction"
    if found.matrix and not any(kind in ("*bf16", "*fp16") for kind in specimen.signature.values()):
        yield "matrix instructions where nothing has 16 bits: float32 is multiplied as TF32"
    if found.fused_multiply_adds and specimen.separate_roundings:
        yield f"{found.fused_multiply_adds} fused multiply-adds, where every rounding was promised"


def judged(module: str, architecture: int, limits: dict[str, int]) -> list[KernelVerdict]:
    """Compile and judge the specimens of one module; whatever an import or a compiler raises is a fault of theirs."""
    from harness.kernels.triton.machine_code import machine_code

    try:
        specimens = getattr(importlib.import_module(f"{__package__}.{module}"), "SPECIMENS", [])
    except Exception as error:  # noqa: BLE001 - one module that does not import hides no other's verdict
        return [KernelVerdict(module, architecture, None, (f"does not import: {_short(error)}",))]
    verdicts = []
    for one in specimens:
        if architecture < one.oldest:
            continue
        try:
            found = machine_code(one, architecture)
        except Exception as error:  # noqa: BLE001 - Triton raises many types, and each is this specimen's verdict
            verdicts.append(KernelVerdict(one.name, architecture, None, (f"does not compile: {_short(error)}",)))
        else:
            wrong = tuple(faults(one, found, architecture, limits.get(one.name)))
            verdicts.append(KernelVerdict(one.name, architecture, found, wrong))
    return verdicts


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' | '.join(lines[-3:])[:300]}"


def judge_all(chosen: list[str], architectures: list[int], table: Table, version: str) -> list[KernelVerdict]:
    """Judge the specimens of the chosen modules for all architectures, by two processes."""
    limits = {architecture: table.get(version, {}).get(f"sm_{architecture}", {}) for architecture in architectures}
    # Compilers and threads of torch do not survive a fork; a fresh process has neither.
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = [
            pool.submit(judged, module, architecture, limits[architecture])
            for module in chosen
            for architecture in architectures
        ]
        verdicts = [verdict for task in tasks for verdict in task.result()]
    counts = Counter((one.name, one.architecture) for one in verdicts)
    return [
        replace(one, faults=(*one.faults, "another specimen has this name"))
        if counts[one.name, one.architecture] > 1
        else one
        for one in verdicts
    ]


def entered(table: Table, verdicts: list[KernelVerdict], version: str, architecture: int, *, whole: bool) -> None:
    """Enter the registers that were found; `whole`: forget those of specimens that are no more."""
    found = {one.name: one.found.registers for one in verdicts if one.found and one.architecture == architecture}
    row = table.setdefault(version, {})
    kept = {} if whole else row.get(f"sm_{architecture}", {})
    row[f"sm_{architecture}"] = {**kept, **found}


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.ahead", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--arch",
        type=int,
        action="append",
        required=True,
        choices=sorted(SHARED),
        help="compute capability, such as 90",
    )
    parser.add_argument("--module", action="append", help="a module of this package, such as nf4; all by default")
    parser.add_argument("--json", action="store_true", help="what was found, as JSON")
    parser.add_argument("--write", action="store_true", help=f"enter the registers that were found in {REGISTERS.name}")
    given = parser.parse_args(arguments)
    if unknown := set(given.module or ()) - set(modules()):
        parser.error(f"no module {', '.join(sorted(unknown))}; there are {', '.join(modules())}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 compiles nothing; unset it")

    from harness.kernels.triton.machine_code import version

    table: Table = json.loads(REGISTERS.read_text()) if REGISTERS.exists() else {}
    chosen = given.module or modules()
    verdicts = judge_all(chosen, given.arch, table, version())
    if given.write:
        for architecture in given.arch:
            entered(table, verdicts, version(), architecture, whole=not given.module)
        REGISTERS.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        verdicts = judge_all(chosen, given.arch, table, version())
    if given.json:
        print(json.dumps({"triton": version(), "verdicts": [asdict(one) for one in verdicts]}, indent=1))
    else:
        for one in verdicts:
            print(one.line())
    if not verdicts:
        print("no module has specimens", file=sys.stderr)
        return 2
    return int(any(one.faults for one in verdicts))


if __name__ == "__main__":
    sys.exit(main())
