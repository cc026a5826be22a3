"""Kernels and device functions that the Triton Operations are built from. None of them is an Operation."""
