"""Encode and decode whole blocks of NF4 by float32 expressions that inductor vectorises completely.

The two values of a packed byte are loaded and stored as one word, twice as wide as a value, so that loads and stores
are contiguous. A level is found by 15 selections, because inductor does not vectorise table look-ups.
"""

from __future__ import annotations

from functools import cache
from threading import Lock

import torch
from torch import Tensor

from harness.kernels.torch.support.compiled import Compiled, only_compiled

_MAKING = Lock()
"""Lock for making a `Compiled` function, so that two threads do not compile the same function."""
_BLOCKS = tuple(1 << i for i in range(5, 13))
"""Supported block sizes, 32 to 4096. Each has its own compiled code, so that loops have constant bounds."""


def encode(values: Tensor, packed: Tensor, absmax: Tensor, block: int, levels: tuple[float, ...]) -> int:
    """Write the packed codes and the absmax of all whole blocks of `values`. Return the number of values encoded.

    values: (n,), any floating dtype, copied to float32. packed: uint8 (ceil(n / 2),). absmax: float32 (ceil(n /
    block),). levels: the 16 levels of NF4. The result is 0 if compiled code is not used. Beyond the encoded blocks,
    `packed` and `absmax` are undefined.
    """
    blocks = values.numel() // block
    count = blocks * block
    if block not in _BLOCKS:
        return 0
    with _MAKING:
        run = _encoder(block, levels)
    if not run.wanted(count, values, packed, absmax):
        return 0
    done = run(
        (values[:count].float(), torch.int64, (blocks, block // 2)),
        (packed, torch.uint8, (blocks, block // 2)),
        (absmax, torch.float32, (blocks,)),
        out=(packed, absmax),
    )
    return count if done else 0


def decode(packed: Tensor, absmax: Tensor, out: Tensor, block: int, levels: tuple[float, ...]) -> int:
    """Write the values of all whole blocks to `out`. Return the number of values decoded.

    packed: uint8 (ceil(n / 2),). absmax: float32 (ceil(n / block),). levels: the 16 levels of NF4. out: (n,). The
    result is 0 if compiled code is not used, as for every `out` that is not float32: a float32 copy would cost as much
    as compilation gains. Beyond the decoded blocks, `out` is undefined.
    """
    blocks = out.numel() // block
    count = blocks * block
    if block not in _BLOCKS or out.dtype != torch.float32:
        return 0
    with _MAKING:
        run = _decoder(block, levels)
    if not run.wanted(count, packed, absmax, out):
        return 0
    done = run(
        (packed, torch.uint8, (blocks, block // 2)),
        (absmax, torch.float32, (blocks,)),
        (out, torch.int64, (blocks, block // 2)),
        out=(out,),
    )
    return count if done else 0


@cache
def _encoder(block: int, levels: tuple[float, ...]) -> Compiled:
    exact = torch.tensor(levels, dtype=torch.float32, device="cpu")
    midpoints: list[float] = ((exact[:-1] + exact[1:]) / 2).tolist()

    def code(scaled: Tensor) -> Tensor:
        """Return the code of the level nearest to each scaled value, as float32.

        A NaN gets the highest code, because every comparison with it is false.
        """
        code = torch.full_like(scaled, 15.0)
        for below, midpoint in reversed(list(enumerate(midpoints))):
            code = torch.where(scaled <= midpoint, float(below), code)
        return code

    def nf4_encode(pairs: Tensor, packed: Tensor, absmax: Tensor) -> None:
        only_compiled()
        first, second = pairs.to(torch.int32).view(torch.float32), (pairs >> 32).to(torch.int32).view(torch.float32)
        largest = torch.maximum(first.abs(), second.abs()).amax(dim=1)
        divisor = torch.where(largest == 0, 1.0, largest)[:, None]
        codes = code(first / divisor) * 16 + code(second / divisor)
        packed.copy_(codes.to(torch.int32).to(torch.uint8))
        absmax.copy_(largest)

    return Compiled(nf4_encode)


@cache
def _decoder(block: int, levels: tuple[float, ...]) -> Compiled:
    def level(code: Tensor) -> Tensor:
        """Return the level for the lowest four bits of each code.

        Each bit selects one half of the remaining levels.
        """
        bits = [code & 1 << i != 0 for i in range(4)]
        left = [torch.full_like(code, level, dtype=torch.float32) for level in levels]
        for bit in bits:
            left = [torch.where(bit, left[i + 1], left[i]) for i in range(0, len(left), 2)]
        return left[0]

    def bits(x: Tensor) -> Tensor:
        """Return int64 words whose lower halves hold the bits of the float32 numbers x."""
        return x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF

    def nf4_decode(packed: Tensor, absmax: Tensor, pairs: Tensor) -> None:
        only_compiled()
        codes, scale = packed.to(torch.int32), absmax[:, None]
        pairs.copy_(bits(level(codes >> 4) * scale) | bits(level(codes) * scale) << 32)

    return Compiled(nf4_decode)
