"""The command `bench`: time Operations and training steps. First, all compared implementations must pass the same
checks.
"""
