"""Compare tensors with the float64 reference: observe them, measure and judge their errors, and report check results."""
