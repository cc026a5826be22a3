"""Kernels and device functions on which the Triton Operations are built. None of them is an Operation."""
