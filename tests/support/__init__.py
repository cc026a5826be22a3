"""Helpers of the tests, which import them as `support.<module>`."""
