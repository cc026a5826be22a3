"""Mutants: copies of a source file with one change made by machine, which the checks should notice.

`check --self-test --mutants N` tries N mutants. A planted fault (see `harness.conformance.faults`) is a mistake that
somebody thought of, and shows that a named check works. A mutant is a mistake that nobody thought of. So mutants show
which share of such mistakes the checks find.
"""
