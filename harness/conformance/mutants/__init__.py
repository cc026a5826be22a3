"""Mutants: copies of a source file with one change made by machine, which the checks should notice.

`check --self-test --mutants N` tries N mutants. The planted faults in `harness.conformance.faults` show that a named
check works. A mutant is a mistake that nobody had in mind. So mutants estimate the share of such mistakes that the
checks find.
"""
