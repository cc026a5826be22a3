"""Training: one plain loop, the same data order for every method."""
