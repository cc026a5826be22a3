"""Findings: the outcome of each check, the known defects of libraries, and the report of one `check`. No torch."""
