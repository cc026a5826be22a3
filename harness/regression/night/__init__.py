"""The command `night`: a plan of measurements on one card, within a budget of time."""
