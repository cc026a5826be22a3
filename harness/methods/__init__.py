"""Methods: their specs, read from `reference/`, and the registry of their implementations."""
