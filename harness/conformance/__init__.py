"""Conformance: parity suites, cases, checks and planted faults, judged against a float64 reference."""
