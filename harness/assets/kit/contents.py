"""Contents of a kit, most valuable first. The other machine has torch, triton, transformers and peft."""

from __future__ import annotations

from typing import NamedTuple

NEEDED = (
    "pyyaml", "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions", "click", "rich",
    "markdown-it-py", "mdurl", "pygments", "jinja2", "markupsafe", "psutil", "packaging",
)  # fmt: skip
"""Distributions without which no command starts. The other machine may have them; then they are not unpacked there."""
USEFUL = (
    "bitsandbytes",
    "torchao",
    "nvidia-ml-py",
    "hypothesis",
    "sortedcontainers",
    "loralib",
    "galore-torch",
)
"""Distributions that parts of a night use. `bitsandbytes` comes first: it is the rival of most operations."""
LAST = ("scipy",)
"""Large distributions of lesser use. `scipy` judges pairs of runs."""


class Half(NamedTuple):
    """A model that the kit may hold in float16."""

    model: str
    """Name in suites/sources.yaml."""
    suite: str
    """The suite that trains it. The kit's `half.yaml` is this suite with the smaller model."""
    data: tuple[str, ...] = ()
    """Names in suites/sources.yaml of the data of this suite."""


HALF = (Half("minilm-l6", "sentinels", ("movie-reviews",)), Half("tiny-llama", "night"))
"""The best model comes first. The first that fits together with its data is taken."""
SOURCES = ("tiny-llama", "toy-sentiment", "movie-reviews", "minilm-l6")
"""Models and data, by their names in suites/sources.yaml."""
FOLDERS = ("harness", "reference", "suites", "report_templates", "results/baselines")
FILES = ("pyproject.toml", "README.md")
"""Parts of a checkout that a kit holds."""
