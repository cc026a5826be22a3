"""Helpers of the tests. Tests import them as `support.<module>`."""
