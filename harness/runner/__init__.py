"""Run suites. Each Cell runs in a process of its own, and its Record is on disk as soon as the Cell is finished."""
