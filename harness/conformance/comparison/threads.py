"""Call a function in several threads at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock
from typing import TypeVar

_SWITCH_S = 1e-6
"""Seconds after which Python may switch to another thread. With the usual 5 ms, small layers would run one after another."""
_ONE_AT_A_TIME = Lock()  # the interval is one for the whole process
_Given = TypeVar("_Given")
_Found = TypeVar("_Found")


def at_once(call: Callable[[_Given], _Found], given: Sequence[_Given]) -> list[_Found]:
    """Return `call(item)` for each item of `given`. Every call has its own thread, and all start at the same time.

    With Triton's interpreter, the calls run one after another. The interpreter replaces functions of Triton while a
    kernel runs, so two threads would disturb each other.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return [call(one) for one in given]
    gate = Barrier(len(given))

    def begin(one: _Given) -> _Found:
        gate.wait()
        return call(one)

    with _ONE_AT_A_TIME:
        interval = sys.getswitchinterval()
        try:
            sys.setswitchinterval(_SWITCH_S)
            with ThreadPoolExecutor(len(given)) as threads:
                return list(threads.map(begin, given))
        finally:
            sys.setswitchinterval(interval)
