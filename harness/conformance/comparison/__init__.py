"""Comparison of tensors: what is observed, how far it may be from the float64 reference, and the result of a check."""
