"""The command `peft-harness night` (a nightly run): checks and measurements on one GPU, within a limited time.

Each part of a nightly run is one command of peft-harness, in its own process.
"""
