"""Implementations, one file or package per provider. Functions import third-party libraries, so that listing is fast."""
