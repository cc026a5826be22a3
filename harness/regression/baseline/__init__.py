"""Baselines: runs in results/baselines that later runs are compared with."""
