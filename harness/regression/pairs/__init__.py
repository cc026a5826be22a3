"""Interleaved A/B pairs of process runs: `gate --pairs OLD NEW`."""
