"""The command `bench`: time Operations and training steps of implementations that have passed the same checks."""
