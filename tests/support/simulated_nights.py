"""Simulated step times of Cells over many nights."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LEAST = math.log1p(0.02)
NIGHT = 45
"""First night on which a tenth of the simulated Cells are slower."""


def simulated(seed: int, slower: float, cells: int = 200, nights: int = 60) -> Array:
    """Return log step times, shape (cells, nights). The first tenth of the Cells is slower from NIGHT on.

    A time is the median of three passes. The time of a pass is the product of the level of the Cell, the shift of the night
    (sd 2 %), the noise of the process (sd 0.8 %) and the median of 30 steps (sd 1.5 % each); one pass in 33 is slower by
    5 to 20 %. On night 30 the whole machine becomes slower by 14 %.
    """
    rng = np.random.default_rng(seed)
    shared = rng.normal(0, 0.02, nights)
    shared[30:] += math.log(1.14)
    shape = (3, cells, nights)
    noise = rng.normal(0, math.hypot(0.008, 0.015 * math.sqrt(math.pi / 2 / 30)), shape)
    noise += np.where(rng.random(shape) < 0.03, np.log1p(rng.uniform(0.05, 0.20, shape)), 0)
    logs = rng.normal(-3, 1, (cells, 1)) + shared + np.median(noise, axis=0)
    logs[: cells // 10, NIGHT:] += math.log1p(slower)
    return logs
