"""Detection of regressions: baselines, pairs of runs, and the history of nightly runs. It imports no torch."""
