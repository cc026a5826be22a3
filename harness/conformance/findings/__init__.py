"""Findings: outcomes of checks, known defects of libraries, and the report of the command `check`. Imports no torch."""
