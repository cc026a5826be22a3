"""Comparison of tensors: observations, the tolerated distance from the float64 reference, and the result of a check."""
