"""Tests of Triton's kernels on a CPU, by its interpreter, which a process has from its first import or never:

TRITON_INTERPRET=1 python -m pytest tests/interpreted
"""

from __future__ import annotations

import os

# Elsewhere these kernels would want a GPU; what they compile to is judged by tests/test_ahead.py.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
