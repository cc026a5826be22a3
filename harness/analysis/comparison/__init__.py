"""Comparisons: of a run with a baseline, of reruns with each other, and of old with new code by A/B pairs of runs."""
