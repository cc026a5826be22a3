"""Contents of a kit: a folder with all that a machine without network needs to run `peft-harness night`.

The most valuable contents come first. The machine must already have torch, triton, transformers and peft.
"""

from __future__ import annotations

from typing import NamedTuple

NEEDED = (
    "pyyaml", "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions", "click", "rich",
    "markdown-it-py", "mdurl", "pygments", "jinja2", "markupsafe", "psutil", "packaging",
)  # fmt: skip
"""Distributions without which no command starts. Those that the target machine already has are not unpacked there."""
USEFUL = (
    "bitsandbytes",
    "torchao",
    "nvidia-ml-py",
    "hypothesis",
    "sortedcontainers",
    "loralib",
    "galore-torch",
)
"""Distributions that some measurements of `peft-harness night` use. `bitsandbytes` comes first, since most operations
are timed against it."""
LAST = ("scipy",)
"""Large distributions that are less useful. scipy is needed to judge pairs of runs (`gate --pairs`)."""


class Half(NamedTuple):
    """A model that the kit (see this module) may hold in float16."""

    model: str
    """Name of the model in suites/sources.yaml."""
    suite: str
    """The suite that trains this model. The kit's `half.yaml` is this suite with the float16 model."""
    data: tuple[str, ...] = ()
    """Names in suites/sources.yaml of the data of this suite."""


HALF = (Half("minilm-l6", "sentinels", ("movie-reviews",)), Half("tiny-llama", "night"))
"""Candidates for the one float16 model of a kit, best first. The first that fits together with its data is copied."""
SOURCES = ("tiny-llama", "toy-sentiment", "movie-reviews", "minilm-l6")
"""Names in suites/sources.yaml of the models and data that `peft-harness kit` copies as far as they fit."""
FOLDERS = ("harness", "reference", "suites", "report_templates", "results/baselines")
FILES = ("pyproject.toml", "README.md")
"""Files at the top of a checkout that are copied into a kit. `FOLDERS` are the copied folders."""
