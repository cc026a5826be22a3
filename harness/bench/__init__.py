"""The command `bench`: times Operations and training steps of programs that first passed the same checks."""
