"""Measure one Cell, i.e. one training setup, in its own process: load, quantise, attach, check, train, evaluate, time."""
