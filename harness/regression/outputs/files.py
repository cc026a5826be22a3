"""Further outputs of a gate: a JUnit file, Markdown for the summary of a CI job, and annotations for GitHub."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from harness.analysis.comparison.baseline_rows import Findings
from harness.errors import UsageError
from harness.records import files
from harness.regression.outputs import github, junit, markdown


@dataclass(frozen=True)
class Outputs:
    """The requested outputs. None for a file: not requested."""

    junit: Path | None = None
    markdown: Path | None = None
    annotations: bool = False
    """True to print annotations outside GitHub jobs too."""

    def refuse(self) -> None:
        """Raise UsageError if a requested file could not be written. Call this before the comparison."""
        given = {"--junit": self.junit, "--markdown": self.markdown}
        problems = {option: why for option, file in given.items() if file and (why := files.unwritable(file))}
        if self.junit and self.markdown and self.junit.absolute() == self.markdown.absolute():
            problems = {"--junit, --markdown": f"both name {self.junit}"}
        if problems:
            hint = "name a file in a folder that can be written"
            raise UsageError("; ".join(problems.values()), where=", ".join(problems), hint=hint)

    def write(self, findings: Findings, title: str) -> None:
        """Write the requested files."""
        if self.junit is not None:
            files.write_atomic(self.junit, junit.render(findings))
        if self.markdown is not None:
            files.write_atomic(self.markdown, markdown.render(findings, title))

    def annotate(self, findings: Findings) -> None:
        """Print the annotations to stderr, after the table."""
        if self.annotations or github.is_job():
            for line in github.lines(findings):
                print(line, file=sys.stderr)
