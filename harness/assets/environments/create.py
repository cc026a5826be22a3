"""Make an environment in a staging folder of the cache, and then rename the folder. A failure leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import venv
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from harness import resources
from harness.assets import cache
from harness.assets.environments import folder, integrity, packages
from harness.assets.environments.folder import EnvironmentFile, MadeEnvironment
from harness.assets.environments.packages import IndexOptions, Package
from harness.assets.environments.table import EnvironmentSpec
from harness.errors import AssetError, plural

Say = Callable[[str], None]
"""Function that reports the next step in one line."""
_MB = 1e6
_GROWTH = 4
"""Estimated bytes on disk per byte of a download. They hold the wheel, its content, and the compiled modules."""
_COMPILED = 1.5
"""Estimated bytes on disk per byte of a wheel's content, with the compiled modules."""
_LINK = "_peft_harness.pth"
_VERSIONS = """
import json, sys
from importlib.metadata import version
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""


def ensure(spec: EnvironmentSpec, options: IndexOptions, say: Say) -> MadeEnvironment:
    """Return the environment that `spec` declares. Make it if it does not exist.

    If another process makes it at the same time, wait for that process. Raises UsageError for a requirement that cannot
    be satisfied, and AssetError for a broken index, a full disk or a broken environment.
    """
    place = folder.place(spec)
    found = folder.read(place)
    if found is None:
        with folder.locked(place, lambda: say(f"{spec.name}: another process makes this environment; waiting for it")):
            found = folder.read(place) or _make(spec, place, options, say)
    integrity.require_start(found)
    return found


def repair(environment: MadeEnvironment, options: IndexOptions, say: Say) -> list[str]:
    """If an environment is damaged, make it again from the same packages. Return what was wrong (see `damage`).

    The damaged environment is replaced only after the new one is complete.
    """
    wrong = integrity.damage(environment)
    if wrong:
        spec, place = environment.file.spec, environment.folder
        with folder.locked(place, lambda: say(f"{spec.name}: another process uses this environment; waiting for it")):
            _make(spec, place, options, say, again=environment.file.packages)
    return wrong


def announce(spec: EnvironmentSpec, options: IndexOptions, say: Say) -> None:
    """Report by `say` which packages an environment would download. Nothing is made."""
    with cache.staging(f"environment {spec.name}") as staging:
        _create_python(spec, staging / "made")
        _choose(spec, staging, options, say)


def _make(
    spec: EnvironmentSpec, place: Path, options: IndexOptions, say: Say, again: Sequence[str] | None = None
) -> MadeEnvironment:
    """Make an environment in the folder `place`. again: `Package.pin` of each package; if None, pip chooses the packages."""
    what = f"environment {spec.name}"
    with cache.staging(what) as staging:
        made = staging / "made"
        python = folder.interpreter(made)
        _create_python(spec, made)
        pins = [one.pin for one in _choose(spec, staging, options, say)] if again is None else list(again)
        wheels = packages.download(spec, python, pins, options, staging)
        content = int(_COMPILED * packages.unpacked_size(wheels))
        cache.require_space(content, what)
        if wheels:
            say(f"{spec.name}: installing {plural(len(wheels), 'package')}, about {content / _MB:,.1f} MB on disk")
        installer = packages.install(spec, python, wheels, staging)
        _move_scripts(made, place)
        file = EnvironmentFile(
            spec=spec,
            base=folder.base(spec),
            versions=_versions(spec, python),
            packages=pins,
            size=folder.size(made),
            made=datetime.now(UTC).isoformat(timespec="seconds"),
            installer=installer,
        )
        (made / folder.FILE).write_text(file.model_dump_json(indent=1) + "\n", encoding="utf-8")
        if again is not None and place.exists():
            place.rename(staging / "damaged")
        cache.promote(made, place)
    return MadeEnvironment(place, file)


def _create_python(spec: EnvironmentSpec, made: Path) -> None:
    """Create the environment's interpreter in `made`, without packages, and make the harness importable in it."""
    venv.EnvBuilder(with_pip=False, symlinks=True).create(made)
    target = folder.site_packages(made)
    if spec.isolated:
        _link_harness(target)
    else:
        # addsitedir also reads the .pth files there, e.g. of editable installs. A mere path in this file would not.
        lines = [f"import site; site.addsitedir({there!r})\n" for there in _site_folders()]
        (target / _LINK).write_text("".join(lines), encoding="utf-8")


def _site_folders() -> list[str]:
    """Return the folders of packages of the Python that runs the harness, in search order."""
    user = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    return [there for there in [*user, *site.getsitepackages()] if Path(there).is_dir()]


def _link_harness(target: Path) -> None:
    """Link `harness` and `reference` into the folder `target`, and copy their entry points there, but nothing else."""
    top = Path(resources.__file__).resolve().parents[1]
    for package in ("harness", "reference"):
        (target / package).symlink_to(top / package)
    try:
        metadata = Path(str(distribution(packages.DISTRIBUTION).locate_file("")), _metadata_folder())
    except PackageNotFoundError as error:
        raise AssetError(
            "the harness is not installed, so an environment cannot find its entry points", hint="pip install -e ."
        ) from error
    (target / metadata.name).mkdir()
    for name in ("METADATA", "entry_points.txt"):
        shutil.copyfile(metadata / name, target / metadata.name / name)


def _metadata_folder() -> str:
    files = distribution(packages.DISTRIBUTION).files or []
    return next((str(file.parent) for file in files if file.name == "METADATA"), "")


def _choose(spec: EnvironmentSpec, staging: Path, options: IndexOptions, say: Say) -> list[Package]:
    """Let pip choose the packages, report their size by `say`, and raise an error if the disk has too little room."""
    say(f"{spec.name}: asking pip for {', '.join(spec.requirements)}")
    chosen = packages.resolve(spec, folder.interpreter(staging / "made"), options, staging)
    if not chosen:
        say(f"{spec.name}: everything is installed already")
        return []
    sizes = [one.size() for one in chosen]
    known = sum(size for size in sizes if size is not None)
    unknown = sizes.count(None)
    names = ", ".join(f"{one.name} {one.version}" for one in chosen[:8]) + (" ..." if len(chosen) > 8 else "")
    more = f", and {plural(unknown, 'file')} of unknown size" if unknown else ""
    say(
        f"{spec.name}: {plural(len(chosen), 'package')} to download, {known / _MB:,.1f} MB{more}; "
        f"{folder.free() / 1e9:,.1f} GB are free: {names}"
    )
    cache.require_space(_GROWTH * known, f"environment {spec.name}")
    return chosen


def _versions(spec: EnvironmentSpec, python: Path) -> dict[str, str]:
    """Return the versions of the required projects, as the environment's interpreter sees them."""
    command = [str(python), "-P", "-c", _VERSIONS, *dict.fromkeys(spec.projects)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ""})
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise AssetError(f"cannot make environment {spec.name}: its Python fails: {last}", hint="try another version")
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _move_scripts(made: Path, place: Path) -> None:
    """Replace the interpreter's path in the first line of each script, because `made` will be renamed to `place`."""
    old, new = os.fsencode(f"#!{made}/"), os.fsencode(f"#!{place}/")
    for script in (made / "bin").iterdir():
        if script.is_file() and not script.is_symlink():
            content = script.read_bytes()
            if content.startswith(old):
                script.write_bytes(new + content.removeprefix(old))
