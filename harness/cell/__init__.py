"""Measure one Cell in its own process: load, quantise, attach, check, train, evaluate, time."""
