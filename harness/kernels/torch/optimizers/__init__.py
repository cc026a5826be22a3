"""Optimizers built on the step Operations."""
