"""Predict how much memory a training run needs, from the model's config.json. No weights are read, nothing is trained."""
