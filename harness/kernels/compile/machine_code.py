"""Compile an instance of a kernel (a `Specimen`), and count the instructions in its machine code. This needs no GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from harness.kernels.compile.specimen import Specimen

_TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_MATRIX = re.compile(r"(HMMA|HGMMA|IMMA|QGMMA|IGMMA|DMMA|UTC\w*MMA)\b")


@dataclass(frozen=True)
class MachineCode:
    """Counts that cuobjdump reports for one kernel."""

    registers: int
    """Registers per thread."""
    stack: int
    """Bytes of local memory per thread. Spilled registers are stored there."""
    shared: int
    """Bytes of shared memory per program."""
    instructions: int
    wide_loads: int
    """Number of instructions that load 128 bits per thread from global memory. Asynchronous copies count, too."""
    wide_stores: int
    """Number of instructions that store 128 bits per thread to global memory."""
    narrow_loads: int
    """Number of instructions that load 8 bits per thread from global memory."""
    matrix: dict[str, int]
    """Name of a matrix instruction -> number of its occurrences."""
    fused_multiply_adds: int
    """Number of instructions that multiply and add with one rounding (FFMA)."""


def version() -> str:
    """Return the minor version of Triton, such as `3.6`. The machine code of a kernel depends on this version."""
    return ".".join(triton.__version__.split(".")[:2])


def machine_code(specimen: Specimen, architecture: int) -> MachineCode:
    """Compile an instance of a kernel for an architecture, and return the counts from its machine code.

    architecture: e.g. 90 for sm_90. The installed Triton compiles, and its errors are not caught. Raises RuntimeError
    if cuobjdump fails. The function does not work in a process that runs Triton's interpreter.
    """
    names = specimen.kernel.arg_names
    at = {name: (index,) for index, name in enumerate(names)}
    source = ASTSource(
        fn=specimen.kernel,
        signature={name: specimen.signature.get(name, "constexpr") for name in names},
        constexprs={at[name]: value for name, value in specimen.constants.items()},
        attrs={at[name]: [["tt.divisibility", 16]] for name in specimen.divisible},
    )
    options = {
        "num_warps": specimen.num_warps,
        "num_stages": specimen.num_stages,
        "enable_fp_fusion": specimen.fused_multiply_add,
        **specimen.options,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, listing = _cuobjdump("-res-usage", file.name), _cuobjdump("-sass", file.name)
    return _read(usage, listing, compiled.metadata.shared)


def _cuobjdump(option: str, file: str) -> str:
    done = subprocess.run([str(_TOOL), option, file], capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {option} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _read(usage: str, listing: str, shared: int) -> MachineCode:
    used = {key: int(number) for key, number in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    counts = Counter(_INSTRUCTION.findall(listing))
    if "REG" not in used or not counts:
        raise RuntimeError("cuobjdump lists no kernel")

    def of(name: str, part: str) -> int:
        return sum(n for one, n in counts.items() if one.split(".")[0] == name and part in one.split("."))

    def starting(prefix: str) -> int:
        return sum(n for one, n in counts.items() if one.startswith(prefix))

    return MachineCode(
        registers=used["REG"],
        stack=used["STACK"],
        shared=shared,
        instructions=counts.total(),
        wide_loads=of("LDG", "128") + of("LDGSTS", "128") + starting("UTMALDG"),
        wide_stores=of("STG", "128") + starting("UTMASTG"),
        narrow_loads=of("LDG", "U8") + of("LDG", "S8"),
        matrix=dict(Counter(found for one, n in counts.items() if (found := _name(one)) for _ in range(n))),
        fused_multiply_adds=of("FFMA", "FFMA"),
    )


def _name(instruction: str) -> str:
    found = _MATRIX.match(instruction)
    return found[1] if found else ""
