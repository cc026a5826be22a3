"""Baselines: runs kept in results/baselines to compare later runs with."""
