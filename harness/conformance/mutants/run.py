"""Try the mutants: choose some, run the checks on each in a forked process, and report which mutants survived."""

from __future__ import annotations

import importlib
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pkgutil import walk_packages
from typing import Any

import torch

from harness import yaml_validation
from harness.conformance import checks, operations, self_test
from harness.conformance.mutants import difference, trial
from harness.conformance.mutants.mutant import Mutant, mutants
from harness.conformance.mutants.trial import Catch, Owner
from harness.console import print_json, print_lines, print_note
from harness.errors import Exit
from harness.methods.spec import methods
from harness.process import forks
from harness.records.environment import physical_cores
from harness.resources import data_folder

PACKAGES = ("reference", "harness.kernels.torch", "harness.methods.implementations.fused.methods")
"""Packages whose modules have mutants."""
_TARGETS = 3
"""Largest number of targets (Methods, Operations and quantised bases) whose checks try one mutant. Twenty targets may
call the same shared code."""
_LIMITS = forks.Limits(cpu_s=300, memory_b=8 << 30)


Run = tuple[Owner, str]
"""An implementation: the owner of its code, and the Method, Operation or quantised base that the code implements."""


@dataclass(frozen=True)
class MutantResult:
    """The result of one mutant."""

    mutant: Mutant
    targets: tuple[str, ...]
    """The Methods, Operations and quantised bases whose checks try the mutant. Empty if no case runs the changed
    statement."""
    catch: Catch | None = None
    died: str = ""
    """Signal or exit code that ended the mutant's process before there was a result. Such a mutant counts as caught."""
    equivalent: str = ""
    """Reason why this mutant is not a mistake, from suites/equivalent_mutants.yaml. Empty if it is not in this file."""
    same_bits: bool = False
    """True if plain `check` did not catch the mutant, which computes the same bits as the original in random cases."""
    error: str = ""
    """Reason why the mutant could not be tried. Empty if it was tried."""

    def runs(self) -> list[Run]:
        """List the implementations whose checks try the mutant."""
        return [(trial.owner(self.mutant.module), target) for target in self.targets]

    @property
    def survives(self) -> bool:
        """True if the mutant counts, no check caught it, and its process did not die."""
        return self.counts and not (self.catch or self.died)

    @property
    def counts(self) -> bool:
        """True if the mutant was tried and is a mistake: it may change the results."""
        return bool(self.targets) and not (self.equivalent or self.same_bits or self.error)

    def document(self) -> dict[str, Any]:
        """Return the entry of this mutant in the document of `--json`."""
        catch = self.catch
        return {
            "mutant": self.mutant.name, "kind": self.mutant.kind, "of": list(self.targets), "diff": self.mutant.diff(),
            "caught": catch.form if catch else "died" if self.died else None, "check": catch.check if catch else self.died,
            "raised": bool(catch and catch.raised), "equivalent": self.equivalent or None,
            "same_bits": self.same_bits, "error": self.error or None,
        }  # fmt: skip


@dataclass(frozen=True)
class MutantReport:
    """Results of all mutants that were chosen."""

    verdicts: Sequence[MutantResult]

    def tried(self) -> list[MutantResult]:
        """List the mutants that were tried and are mistakes."""
        return [one for one in self.verdicts if one.counts]

    def survivors(self) -> list[MutantResult]:
        """List the mutants that were tried and are mistakes, but were not caught."""
        return [one for one in self.verdicts if one.survives]

    @property
    def exit(self) -> Exit:
        """The exit code. The first of these rules that applies decides.

        4: a mutant could not be tried. 5: `tried` is empty. 1: a mutant survived. 0: otherwise.
        """
        if any(one.error for one in self.verdicts):
            return Exit.INFRASTRUCTURE
        if not self.tried():
            return Exit.NOTHING_COMPARED
        return Exit.FAIL if self.survivors() else Exit.PASS

    def document(self) -> dict[str, Any]:
        """Return the document that `--json` prints."""
        tried = self.tried()
        return {
            "schema": 1, "tried": len(tried), "caught": len(tried) - len(self.survivors()),
            "caught_by_default": sum(_by_default(one) for one in tried),
            "equivalent": sum(bool(one.equivalent) for one in self.verdicts),
            "same_bits": sum(one.same_bits for one in self.verdicts),
            "not_run": sum(not one.targets for one in self.verdicts),
            "errors": sum(bool(one.error) for one in self.verdicts),
            "mutants": [one.document() for one in self.verdicts],
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        """Yield the printed report: every survivor with its diff, and the share of mutants caught by file, by kind and
        in total.
        """
        tried = self.tried()
        for one in self.survivors():
            yield f"SURVIVES {one.mutant.name} ({one.mutant.kind}; checked: {', '.join(one.targets)})"
            yield from (f"    {line}" for line in one.mutant.diff().splitlines())
        for one in self.verdicts:
            if one.error:
                yield f"COULD NOT BE TRIED {one.mutant.name}: {one.error}"
        yield from _table("file", tried, lambda one: one.mutant.module)
        yield from _table("kind", tried, lambda one: one.mutant.kind)
        if idle := Counter(one.mutant.module for one in self.verdicts if not one.targets):
            files = ", ".join(f"{module} {count}" for module, count in idle.most_common())
            yield f"not counted, because no case on the CPU runs the statement: {idle.total()} ({files})"
        if equivalent := sum(bool(one.equivalent) for one in self.verdicts):
            yield f"not counted, because they are no mistake (suites/equivalent_mutants.yaml): {equivalent}"
        if same := sum(one.same_bits for one in self.verdicts):
            yield f"not counted, because they compute the same bits in {difference.CASES} random cases: {same}"
        caught, raised = len(tried) - len(self.survivors()), sum(bool(one.catch and one.catch.raised) for one in tried)
        yield (
            f"{caught} of {len(tried)} counted mutants caught ({100 * caught / max(1, len(tried)):.1f} %), "
            f"{sum(map(_by_default, tried))} of them by the default check; {raised} raised an exception; "
            f"{len(self.verdicts)} were chosen"
        )


def check(number: int | None, seed: int, jobs: int | None, only: Sequence[str], as_json: bool) -> Exit:
    """Try mutants, print the report as text or JSON, and return the exit code.

    jobs: number of processes. If it is None, there is one process per physical core. Raises UsageError if a name in
    `only` has no parity suite.
    """
    self_test.require_targets(only, "--mutants")
    report = run(number, seed, jobs or physical_cores(), only, print_note)
    if as_json:
        print_json(report.document())
    else:
        print_lines(report.lines())
    return report.exit


def run(
    number: int | None, seed: int, jobs: int, only: Collection[str], progress: Callable[[str], None]
) -> MutantReport:
    """Try `number` random mutants, or all if it is None, and return the report.

    only: names of the Methods, Operations and quantised bases whose checks are run. If it is empty, all checks are run.
    progress: called with a line of text for every mutant that no check of a round catches, and after every 50 mutants.
    The rounds are the checks of plain `check` and of `check --wide`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork of a process with several threads may hang
    try:
        return _run(number, seed, jobs, only, progress)
    finally:
        torch.set_num_threads(threads)


def _run(
    number: int | None, seed: int, jobs: int, only: Collection[str], progress: Callable[[str], None]
) -> MutantReport:
    checks.every(), operations.every(), methods()  # imported once, before the forks
    callers = _callers(jobs, only)
    chosen = [mutant for module in modules() for mutant in mutants(module)]
    if only or number is not None:
        chosen = [one for one in chosen if callers[one.module, one.function]]
    if number is not None:
        drawn = random.Random(seed).sample(chosen, min(number, len(chosen)))  # noqa: S311
        chosen = sorted(drawn, key=lambda mutant: (mutant.module, mutant.start))
    reasons = equivalent()
    trials = _Trials({}, jobs, progress)
    for mutant in chosen:
        reason = reasons.get(mutant.name, reasons.get(mutant.module, ""))
        trials.verdicts[mutant] = MutantResult(mutant, tuple(_chosen(mutant, callers)), equivalent=reason)
    trials.run_checks(trial.DEFAULT)
    trials.compare_bits()  # first, because the checks that only `--wide` runs take long
    trials.run_checks(trial.WIDE)
    return MutantReport([trials.verdicts[mutant] for mutant in chosen])


@dataclass
class _Trials:
    """The trials of the chosen mutants."""

    verdicts: dict[Mutant, MutantResult]
    """The verdict so far on each mutant. Only mutants that survive so far are tried further."""
    jobs: int
    progress: Callable[[str], None]
    reached: set[Mutant] = field(default_factory=set)
    """The mutants whose changed statement has run at least once."""

    def run_checks(self, form: str) -> None:
        """Run the checks on every mutant that survives so far.

        form: `default` for the cases that plain `check` tries, `wide` for the cases of `check --wide`.
        """
        alive = self._alive()

        def act(mutant: Mutant) -> tuple[dict[str, Any] | None, bool]:
            catch = trial.caught(mutant, self.verdicts[mutant].targets, form)
            return vars(catch) if catch else None, trial.is_reached()

        for count, ended in enumerate(forks.run(alive, act, self.jobs, _LIMITS), start=1):
            catch = self._note(ended.task, ended)
            if catch is not None:
                self._update(ended.task, catch=Catch(**catch))
            if self.verdicts[ended.task].survives:
                self.progress(f"{form} checks do not catch {ended.task.name} ({count} of {len(alive)} mutants tried)")
            elif count % 50 == 0:
                self.progress(f"{form} checks: {count} of {len(alive)} mutants tried")

    def compare_bits(self) -> None:
        """Compare every mutant that survives so far with the original, by their results in random cases."""
        alive = self._alive()
        self.progress(f"random cases: {len(alive)} mutants are compared with the original")

        def act(task: tuple[Mutant | None, Run]) -> tuple[list[str], bool]:
            mutant, (of, target) = task
            return trial.digests(target, of, mutant), trial.is_reached()

        pairs = [(mutant, run) for mutant in alive for run in self.verdicts[mutant].runs()]
        originals: list[tuple[Mutant | None, Run]] = [(None, run) for run in dict.fromkeys(run for _, run in pairs)]
        right: dict[Run, list[str]] = {}
        for ended in forks.run(originals, act, self.jobs, _LIMITS):
            if why := ended.died or ended.error:
                raise RuntimeError(f"{ended.task[1]} did not run: {why}")
            right[ended.task[1]] = ended.returned[0]
        different: set[Mutant] = set()
        for mutant_ended in forks.run(pairs, act, self.jobs, _LIMITS):
            mutant, run = mutant_ended.task
            if self._note(mutant, mutant_ended) != right[run]:
                different.add(mutant)
        for mutant in self._alive():
            if mutant not in self.reached:
                self._update(mutant, targets=())
            elif mutant not in different:
                self._update(mutant, same_bits=True)

    def _alive(self) -> list[Mutant]:
        return [mutant for mutant, verdict in self.verdicts.items() if verdict.survives]

    def _note(self, mutant: Mutant, ended: forks.ForkEnd[Any]) -> Any:
        """Record how a forked process ended, and whether it ran the changed statement.

        Return the result of the process. Return None if it died or raised an error.
        """
        if ended.returned is None:
            # An error means that the trial failed. It does not count as caught.
            self._update(mutant, died=ended.died, error=ended.error)
            return None
        found, reached = ended.returned
        if reached:
            self.reached.add(mutant)
        return found

    def _update(self, mutant: Mutant, **changed: Any) -> None:
        self.verdicts[mutant] = replace(self.verdicts[mutant], **changed)


def _chosen(mutant: Mutant, callers: Mapping[tuple[str, str], list[str]]) -> list[str]:
    """Return at most _TARGETS targets that call the changed function. The target named like the module comes first."""
    name = mutant.module.rpartition(".")[2]
    return sorted(callers.get((mutant.module, mutant.function), ()), key=lambda target: target != name)[:_TARGETS]


def _callers(jobs: int, only: Collection[str]) -> dict[tuple[str, str], list[str]]:
    """Map (module, function) to the targets whose cases call the function.

    Targets whose cases call few functions come first, because their checks are quick. An empty function name stands for
    the module's constants: all targets of the module use them.
    """
    owners: tuple[Owner, ...] = ("reference", "fused")
    asked = [(target, of) for of in owners for target in trial.targets(of) if not only or target in only]

    def act(task: tuple[str, Owner]) -> list[tuple[str, str]]:
        return sorted(trial.called_functions(*task))

    found: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    ends = list(forks.run(asked, act, jobs, _LIMITS))
    for ended in sorted(ends, key=lambda one: (len(one.returned or ()), one.task)):
        if why := ended.died or ended.error:
            raise RuntimeError(f"{ended.task[0]} by {ended.task[1]} did not run: {why}")
        for module, function in ended.returned:
            found[module, function].append(ended.task[0])
    for module, function in list(found):
        if function:
            found[module, ""] = list(dict.fromkeys([*found[module, ""], *found[module, function]]))
    return found


def modules() -> list[str]:
    """List the modules that have mutants."""
    found = []
    for package in PACKAGES:
        path = importlib.import_module(package).__path__
        found += [m.name for m in walk_packages(path, f"{package}.") if not m.ispkg]
    return [name for name in found if name != "reference.spec"]


def equivalent() -> dict[str, str]:
    """Map names of mutants that are no mistakes to the reasons, from suites/equivalent_mutants.yaml.

    The name of a module stands for all its mutants.
    """
    file = data_folder("suites") / "equivalent_mutants.yaml"
    listed = yaml_validation.load(file).data
    return {name: reason for reason, names in listed.items() for name in names}


def _by_default(one: MutantResult) -> bool:
    return bool(one.died or (one.catch and one.catch.form == trial.DEFAULT))


def _table(title: str, tried: Sequence[MutantResult], key: Callable[[MutantResult], str]) -> Iterator[str]:
    groups: defaultdict[str, list[MutantResult]] = defaultdict(list)
    for one in tried:
        groups[key(one)].append(one)
    width = max(map(len, [title, *groups]), default=0)
    yield f"{title:<{width}}  mutants  caught by default  with --wide"
    yield from (_rate(name, group, width) for name, group in sorted(groups.items()))


def _rate(name: str, tried: Sequence[MutantResult], width: int) -> str:
    caught, early, count = sum(not one.survives for one in tried), sum(map(_by_default, tried)), max(1, len(tried))
    return f"{name:<{width}}  {len(tried):7}  {100 * early / count:15.1f} %  {100 * caught / count:9.1f} %"
