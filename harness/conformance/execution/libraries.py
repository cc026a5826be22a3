"""Import what nearly every worker of `check` needs: torch with its compiler, transformers' layers, and all checks."""

from __future__ import annotations

import torch._dynamo  # noqa: F401  # the first optimizer imports it
import transformers.pytorch_utils  # noqa: F401

from harness.conformance import checks, operations
from harness.conformance.execution import suite_run, worker  # noqa: F401

checks.every()
operations.every()
