"""Further outputs of a regression gate: a JUnit file, a Markdown summary for a CI job, and annotations for GitHub."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from harness.analysis.comparison.baseline_rows import GateResult
from harness.console import print_lines
from harness.records import files
from harness.regression.outputs import github, junit, markdown


@dataclass(frozen=True)
class Outputs:
    """The outputs that a user requests. A file that was not requested is None."""

    junit: Path | None = None
    markdown: Path | None = None
    annotations: bool = False
    """True to print annotations outside GitHub jobs too."""

    def refuse(self) -> None:
        """Raise UsageError if a requested file cannot be written. This is called before anything is compared."""
        files.refuse_unwritable({"--junit": self.junit, "--markdown": self.markdown})

    def write(self, result: GateResult, title: str) -> None:
        """Print the annotations to stderr, and write the requested files. If one file fails, still write the other."""
        if self.annotations or github.is_job():
            print_lines(github.lines(result), err=True)
        with contextlib.ExitStack() as afterwards:
            if self.markdown is not None:
                afterwards.callback(files.write_atomic, self.markdown, markdown.render(result, title))
            if self.junit is not None:
                files.write_atomic(self.junit, junit.render(result))
