"""Measures: the functions of this package that are marked `@measure`. No other file lists them.

The command `explain` prints the docstring of a measure. The docstring names the quantity, or it begins with `Check
whether` if the measure checks a property.
"""
