"""Predict the memory of a training from a model's shape, without reading weights or training."""
