"""Contents of a kit for a machine without network, most valuable first.

The machine must already have torch, triton, transformers and peft.
"""

from __future__ import annotations

from typing import NamedTuple

NEEDED = (
    "pyyaml", "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions", "click", "rich",
    "markdown-it-py", "mdurl", "pygments", "jinja2", "markupsafe", "psutil", "packaging",
)  # fmt: skip
"""Distributions without which no command starts. Those that the target machine has are not unpacked there."""
USEFUL = (
    "bitsandbytes",
    "torchao",
    "nvidia-ml-py",
    "hypothesis",
    "sortedcontainers",
    "loralib",
    "galore-torch",
)
"""Distributions that parts of a night use. `bitsandbytes` comes first, since most operations are timed against it."""
LAST = ("scipy",)
"""Large distributions of lesser use. `scipy` judges pairs of runs."""


class Half(NamedTuple):
    """A model that the kit may hold in float16."""

    model: str
    """Name of the model in suites/sources.yaml."""
    suite: str
    """The suite that trains it. The kit's `half.yaml` is this suite with the float16 model."""
    data: tuple[str, ...] = ()
    """Names in suites/sources.yaml of the data of this suite."""


HALF = (Half("minilm-l6", "sentinels", ("movie-reviews",)), Half("tiny-llama", "night"))
"""Candidates for the model in float16, best first. A kit holds the first that fits together with its data."""
SOURCES = ("tiny-llama", "toy-sentiment", "movie-reviews", "minilm-l6")
"""Names in suites/sources.yaml of the models and data that a kit holds as far as they fit."""
FOLDERS = ("harness", "reference", "suites", "report_templates", "results/baselines")
FILES = ("pyproject.toml", "README.md")
"""Files at the top of a checkout that a kit copies. `FOLDERS` are the copied folders."""
