"""Contents of a kit, most valuable first. The other machine has torch, triton, transformers and peft."""

from __future__ import annotations

NEEDED = (
    "ruamel.yaml", "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions", "click", "rich",
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
    "scipy",
)
"""Distributions that parts of a night use. `scipy` judges pairs of runs."""
HALF = {"minilm-l6": "sentinels", "tiny-llama": "night"}
"""Name in suites/sources.yaml of each model that the kit may hold in float16, the best first -> the suite that trains it.

The first that fits is taken. The kit's `half.yaml` is this suite with the smaller model.
"""
SOURCES = ("tiny-llama", "toy-sentiment", "movie-reviews", "minilm-l6")
"""Models and data, by their names in suites/sources.yaml."""
FOLDERS = ("harness", "reference", "suites", "report_templates", "results/baselines")
FILES = ("pyproject.toml", "README.md")
"""Parts of a checkout that a kit holds."""
