"""Measures: the functions of this package that are marked `@measure`. No other file lists them.

The command `explain` prints a measure's docstring: a phrase that names the quantity, or `Check whether ...` for a property.
"""
