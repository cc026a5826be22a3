"""Evaluation: what a model scores on a task, item by item."""
