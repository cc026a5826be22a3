"""Kernels and device functions that the Triton Operations use. None of them is an Operation."""
