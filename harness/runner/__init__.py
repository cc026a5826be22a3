"""Run suites: each Cell in a fresh process, by an executor; finished Cells stay on disk, whatever dies."""
