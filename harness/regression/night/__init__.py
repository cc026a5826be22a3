"""The command `peft-harness night` (a nightly run): checks and measurements on one GPU, within a budget of time.

Its parts are commands of peft-harness. Each part runs in a process of its own.
"""
