"""Implementations, one file or package per provider.

Only functions import third-party libraries, so that the Implementations are listed fast.
"""
