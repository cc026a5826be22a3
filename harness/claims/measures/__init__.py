"""Measures: the functions of this package that are marked `@measure`, by name. Nothing else lists them."""
