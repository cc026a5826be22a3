"""Baselines: runs in results/baselines with which later runs are compared."""
