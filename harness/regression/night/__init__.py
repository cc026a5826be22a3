"""The command `peft-harness night` (a nightly run): checks and measurements on one GPU, within a limited time.

A nightly run consists of parts. Each part is a command of peft-harness, and runs in a process of its own.
"""
