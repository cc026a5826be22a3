"""Draw the pictures of README.md from published results: `python .github/images/make.py` (needs Chromium or Chrome).

report.png is the first screen of a run's report; check.png is the top of a conformance matrix.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PUBLISHED = HERE.parents[1] / "results" / "published"
MOST_BYTES = 200_000


@dataclass(frozen=True)
class Picture:
    """A screenshot of a published page."""

    name: str
    page: Path
    width: int
    height: int
    hidden: str
    """CSS selectors of what the picture leaves out; nothing else of the page is changed."""


PICTURES = (
    Picture(
        "report.png", PUBLISHED / "2026-11-26-compare-small-cpu" / "report.html", 1240, 840, "nav, .about",
    ),
    Picture("check.png", PUBLISHED / "2026-11-29-check-cpu" / "check.html", 1180, 900, ".about"),
)  # fmt: skip


def browser() -> str:
    """Return the path of a headless browser, or exit with what to install."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    sys.exit("no Chromium found\n  hint: install Chromium or Chrome")


def draw(picture: Picture) -> int:
    """Take the screenshot and return its bytes."""
    page = picture.page.read_text(encoding="utf-8")
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)  # it would refuse the added style
    page = page.replace("</head>", f"<style>{picture.hidden} {{display: none !important}}</style></head>", 1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(page, encoding="utf-8")
        command = [
            browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={folder}/profile",
            f"--window-size={picture.width},{picture.height}", f"--screenshot={HERE / picture.name}", file.as_uri(),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
    return (HERE / picture.name).stat().st_size


def main() -> None:
    """Draw every picture; exit with an error for one that is too large for a README."""
    for picture in PICTURES:
        size = draw(picture)
        print(f"{picture.name}: {size:,} bytes")
        if size > MOST_BYTES:
            sys.exit(f"{picture.name} is larger than {MOST_BYTES:,} bytes\n  hint: lower its height in PICTURES")


if __name__ == "__main__":
    main()
