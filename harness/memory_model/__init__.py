"""Predict how much memory a training needs, from the model's config.json. No weights are read, nothing is trained."""
