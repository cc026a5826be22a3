"""Ahead-of-time compilation of our Triton kernels for GPUs that this machine need not have."""
