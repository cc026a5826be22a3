"""Regressions: baselines, pairs of runs and the history of nightly runs. No torch."""
