"""Find the suites and the report templates, read paths that users write, and describe the state of the import path."""

from __future__ import annotations

import sys
from pathlib import Path

from harness.errors import UsageError

_PACKAGE = Path(__file__).resolve().parent


def data_folder(name: str) -> Path:
    """Return the folder `suites` or `report_templates`, in a checkout or in an installed wheel."""
    packed = _PACKAGE / "_data" / name
    return packed if packed.is_dir() else _PACKAGE.parent / name


def user_path(path: str) -> Path:
    """Return the path that a user wrote, with `~` expanded. Raises UsageError if the text cannot be a path."""
    hint = "write ./path, /path or ~/path"
    if "\0" in path:
        raise UsageError(f"{path!r} is no path: it holds a zero byte", hint=hint)
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{path!r} is no path: {error}", hint=hint) from error


def published_runs() -> Path | None:
    """Return the folder of published runs. If this package is an installed wheel, which has none, return None."""
    folder = _PACKAGE.parent / "results" / "published"
    return folder if folder.is_dir() and (_PACKAGE.parent / "pyproject.toml").is_file() else None


def checkout() -> Path | None:
    """Return the top folder of the git checkout that contains this package. If there is no checkout, return None."""
    top = _PACKAGE.parent
    return top if (top / ".git").exists() and (top / "pyproject.toml").is_file() else None


def import_path() -> tuple[tuple[str, int], ...]:
    """Return the entries of `sys.path`, each with the time of its last change in ns, or 0 if it does not exist.

    The result changes when a package is installed or removed, because pip then adds or removes a folder. It does not
    change if a file inside a package or a dist-info folder changes.
    """

    def changed(entry: str) -> int:
        try:
            return Path(entry).stat().st_mtime_ns  # the entry '' is the current folder, as Path('') is
        except OSError:
            return 0

    return tuple((entry, changed(entry)) for entry in sys.path)
