"""The command `bench`: time Operations and training steps of programs that first passed the same checks."""
