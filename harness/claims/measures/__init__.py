"""Measures: the functions of this package that are marked `@measure`. No other file lists them.

`explain` prints their docstrings: a phrase that names the quantity, or `Check whether ...` for a property.
"""
