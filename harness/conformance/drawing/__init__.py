"""Choose the cases that `check` tries: a sample that covers pairs of settings, and random cases by Hypothesis.

A setting of a case is called a factor, and a value that the sample tries for it is called a level.
"""
