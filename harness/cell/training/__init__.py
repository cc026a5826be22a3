"""Train a model in one plain loop, with the same data order for every Method."""
