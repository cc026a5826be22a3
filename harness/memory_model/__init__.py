"""Predict how much memory a training needs, from the model's shape. No weights are read, and nothing is trained."""
