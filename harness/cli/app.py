"""The command group `peft-harness`, its entry point and its error handling.

Each command is a module of this package. The module imports the command's implementation only when the command runs, so
that `--help` answers at once. Results go to stdout. Progress and diagnostics go to stderr.
"""

from __future__ import annotations

import errno
import io
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import click

from harness.cli.baseline import baseline
from harness.cli.bench import bench
from harness.cli.check import check
from harness.cli.claims import claims
from harness.cli.doctor import doctor
from harness.cli.env import env
from harness.cli.explain import explain
from harness.cli.export import export
from harness.cli.fit import fit
from harness.cli.gate import gate
from harness.cli.history import history
from harness.cli.importing import import_
from harness.cli.kit import kit
from harness.cli.listing import list_
from harness.cli.night import night
from harness.cli.plan import plan
from harness.cli.report import report
from harness.cli.run import run
from harness.console import discard_stdout, format_warning, report_bug, report_error
from harness.errors import Exit, HarnessError, UsageError, closest_match

_RIGHTS = "change the permissions, or name another path"
_FILE_HINTS = {
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.ENAMETOOLONG: "name a shorter path",
    errno.ELOOP: "the links lead in a circle; name another path",
    errno.ENOTDIR: "a part of the path is a file; name another path",
}
"""Number of an OSError -> hint. The system raises these errors for paths that a user has named."""


class _Group(click.Group):
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command of a command line. For an unknown name, the error names the closest command."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if close := closest_match(args[0], self.list_commands(ctx)):
                raise click.UsageError(f"{error.message} Did you mean '{close}'?", ctx) from error
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command and return its exit code.

        If the reader of stdout has closed it, return INFRASTRUCTURE. click would return 1, which means a finding.
        """
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            discard_stdout()
            return Exit.INFRASTRUCTURE


@click.group(
    cls=_Group,
    commands=[
        baseline, bench, check, claims, doctor, env, explain, export, fit, gate, history, import_, kit, list_, night, plan,
        report, run,
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)  # fmt: skip
@click.version_option(package_name="peft-harness", message="%(prog)s %(version)s")
def commands() -> None:
    """Conformance tests and benchmarks of parameter-efficient fine-tuning: does an implementation compute its method, what
    does it cost, and how well does it score?

    \b
    Exit codes:
      0  pass                        3  undecided (mostly with --strict only)
      1  a finding                   4  not measured, interrupted, or the machine failed
      2  wrong use, invalid suite    5  nothing was measured or compared
    `peft-harness explain 4` gives the details of code 4, and so on.
    """


def _command_path(error: click.UsageError, words: Sequence[str]) -> str:
    """Return the command that was used wrongly, e.g. `peft-harness history add`. words: the arguments of the process."""
    if error.ctx and error.ctx.parent:
        return error.ctx.command_path
    # If an option lacks its argument, click names the whole program in the place of the command.
    path = ["peft-harness"]
    command: click.Command = commands
    for word in words:
        if not isinstance(command, click.Group) or word not in command.commands:
            break  # an option or a wrong name, after which a command may be anything
        command = command.commands[word]
        path.append(word)
    return " ".join(path)


def _example(error: click.UsageError) -> str:
    """Return the example of the command if the error is a missing argument or option. Otherwise return ""."""
    epilog = error.ctx.command.epilog if error.ctx and isinstance(error, click.MissingParameter) else None
    return f"e.g. `{epilog.removeprefix('Example: ')}`; " if epilog else ""


def launch(argv: Sequence[str] | None = None) -> int:
    """Run `peft-harness` with these arguments (by default those of the process) and return its exit code."""
    sys.excepthook = report_bug  # Python's default hook exits with 1, which means a finding
    for name in ("torchao", "torch.utils._pytree"):  # importing torchao warns of kernels for GPUs that are not here
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.formatwarning = format_warning  # type: ignore[assignment]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal must not cause a crash
    try:
        code = int(commands.main(args=argv, prog_name="peft-harness", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = Exit.USAGE
    except click.Abort:  # Ctrl-C
        code = report_error(HarnessError("interrupted", hint="the run folder, if there is one, has the finished Cells"))
    except click.UsageError as error:
        path = _command_path(error, sys.argv[1:] if argv is None else argv)
        message = " ".join(error.format_message().split())  # click puts choices on separate lines
        where = path.removeprefix("peft-harness").strip()
        code = report_error(UsageError(message, where=where, hint=f"{_example(error)}see `{path} --help`"))
    except HarnessError as error:
        code = report_error(error)
    except OSError as error:
        if error.errno not in _FILE_HINTS or error.filename is None:
            raise  # a bug
        kind = UsageError if error.errno == errno.ENAMETOOLONG else HarnessError
        what = f"cannot be used: {error.strerror}"
        code = report_error(kind(what, where=str(error.filename), hint=_FILE_HINTS[error.errno]))
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        discard_stdout()
    return code
