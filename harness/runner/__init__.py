"""Run suites: each Cell in a fresh process, by an executor; finished Cells stay on disk even if a process dies."""
