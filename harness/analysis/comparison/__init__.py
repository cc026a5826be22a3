"""Comparisons of two runs: with a baseline, with a rerun, and of A/B pairs."""
