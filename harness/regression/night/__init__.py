"""The command `night`: a plan of measurements on one GPU, within a budget of time."""
