"""Measure memory, latency, energy, file sizes and the state of the GPU."""
