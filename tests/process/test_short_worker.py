"""A short worker hides packages that it does not need, and ends with code 0 after it has written its output."""

from __future__ import annotations

import subprocess
import sys

from support.repository import TOP

CODE = """
import atexit, colorsys
from harness.process import short_worker

atexit.register(print, "Python's own exit")
short_worker.hide(["colorsys", "this"])
import colorsys
try:
    import this
except ImportError:
    print("hidden", end="")
short_worker.end()
"""


def test_a_package_is_hidden_unless_it_is_in_use_and_the_end_is_quick() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=TOP, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hidden", "")
