"""Measuring: memory, latency, and the environment that the numbers belong to."""
