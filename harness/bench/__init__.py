"""The command `bench`: time Operations and training steps of implementations that have first passed the same checks."""
