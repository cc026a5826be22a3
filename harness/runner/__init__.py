"""Run suites. Each Cell runs in a new process, and its Record is on disk as soon as the Cell is finished."""
