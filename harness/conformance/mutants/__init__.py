"""Mutants: copies of a source file with one change made by machine, which the checks should notice.

`check --self-test --mutants N` tries N of them. The planted faults in `harness.conformance.faults` show that a named check
works; mutants estimate which share of mistakes that nobody thought of the checks find.
"""
