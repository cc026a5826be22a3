"""Run suites. An executor runs each Cell in a new process; finished Cells stay on disk even if a process dies."""
