"""Score a model on the items of a task."""
