"""Run parity suites: case by case in this process, or in worker processes that may crash or hang."""
