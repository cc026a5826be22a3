"""Prediction of training memory from shapes: no weights are read, and nothing trains."""
