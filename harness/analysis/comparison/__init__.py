"""Comparisons: of a run with a baseline, of reruns with each other, and of the two sides of A/B pairs."""
