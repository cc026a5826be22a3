"""Implementations, one file or package per provider.

Third-party libraries are imported inside functions only, so that listing the Implementations is fast.
"""
