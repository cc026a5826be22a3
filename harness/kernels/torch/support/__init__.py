"""Helpers of the torch Operations: memory, threads, autograd and linear algebra. None of them is an Operation."""
